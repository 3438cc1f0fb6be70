"""Results that nobody gave a place for lie in large pages."""

import mmap
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge import fresh

MAPS = Path("/proc/self/smaps")


def asked_for_large_pages(address: int) -> bool:
    inside = False
    for line in MAPS.read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError(f"no mapping of {address:#x}")


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE") or not MAPS.exists(), reason="only Linux gives such advice")
def test_results_lie_in_large_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no large pages for programs")
    base, model = torch.zeros(16 << 20, dtype=torch.bfloat16), torch.ones(16 << 20, dtype=torch.bfloat16)
    results = [pymerge.ties(base, [model, model]), pymerge.linear([base, model]), pymerge.wise_ft(base, model)]
    results.append(pymerge.linear([{"a": base, "b": base}, {"a": model, "b": model}])["b"])
    for result in results:
        assert asked_for_large_pages(result.data_ptr() + result.nbytes // 2)


def test_small_and_empty_results():
    for shape in ((), (0,), (3, 5), (fresh.LARGE // 4,)):
        t = fresh.empty(shape, torch.float32, torch.device("cpu"))
        assert t.shape == shape and t.dtype is torch.float32 and t.fill_(1.0).sum() == t.numel()
