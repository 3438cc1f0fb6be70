"""Exact selection on the device against the reference: thresholds, cuts and ties, on data made to break it."""

import pytest
import torch

pytest.importorskip("triton")

from pymerge import reference, triton_backend
from pymerge.triton_kernels import threshold
from pymerge.triton_kernels.launch import CHUNK

from ..core.conftest import HOSTILE
from .conftest import there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def samples_early(monkeypatch):
    """The interpreter is slow: take the way of large tensors for small ones."""
    monkeypatch.setattr(threshold, "SMALL", 2000)


def check(bases, models, counts, ties=("first", "all")):
    for tie_break in ties:
        on_device = [there(b) for b in bases] if bases else None
        got = triton_backend.select(on_device, [[there(t) for t in row] for row in models], counts, tie_break)
        assert got.tolist() == reference.select(bases, models, counts, tie_break).tolist()


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data(kind):
    torch.manual_seed(0)
    for n in (1, 31, 1999, 5003):
        base, model = HOSTILE[kind](n).bfloat16(), HOSTILE[kind](n).bfloat16()
        check([base], [[model]] * 3, [n // 5, n // 2, n - 1])
        check(None, [[model.float()]] * 2, [1, n // 3], ties=("first",))


def test_all_or_nothing():
    x = torch.randn(3000)
    check(None, [[x]] * 4, [0, 3000, 3001, 7])
    check(None, [[x[:0]]], [1])


def test_fp64_and_mixed_dtypes():
    torch.manual_seed(1)
    for n in (100, 4000):
        x = HOSTILE["huge_range"](n)
        check([x * 0.5], [[x], [x.flip(0)]], [n // 5, n // 2])
        check([x.half()], [[x.bfloat16()], [x.float()]], [n // 5, n // 2])


def test_many_tensors_are_ranked_together():
    torch.manual_seed(2)
    sizes = [3, 0, CHUNK + 700, 1, 4096, 33, 0, 5]
    bases = [torch.randn(n).to(torch.float16 if i % 3 == 1 else torch.bfloat16) for i, n in enumerate(sizes)]
    models = [[(b.float() + torch.randn(len(b)) * 10 ** (i % 3 - 2)).to(b.dtype) for i, b in enumerate(bases)] for _ in range(2)]
    total = sum(sizes)
    for k in (total // 10, total // 2):
        check(bases, models, [k, total - k])


def test_a_sample_that_misleads_is_found_out():
    # 1 % of the elements, in one place, hold all the large values: a bracket from a sample is wide or wrong, the result is not.
    torch.manual_seed(3)
    n = 12_007
    x = torch.rand(n) * 1e-3
    x[7000 : 7000 + n // 100] += torch.rand(n // 100) * 100
    counts = [1, n // 200, n // 100 + 1, n // 2]
    check(None, [[x]] * 4, counts, ties=("first",))


@pytest.mark.parametrize("wide", [False, True])
def test_digit_by_digit_when_the_bracket_is_of_no_use(monkeypatch, wide):
    torch.manual_seed(4)
    n = 1201
    integer, floating = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
    values = [torch.randint(1000, 1007, (n,), dtype=integer), torch.randint(0, 2**30, (n,), dtype=integer)]
    monkeypatch.setattr(threshold, "SMALL", 1000)
    monkeypatch.setattr(threshold.Selector, "_guess", lambda self, counts: [(5, 5, 5)] * len(counts))
    check(None, [[v.view(floating)] for v in values], [n // 3, n // 2])


def test_the_cut_of_a_tie_may_lie_in_any_chunk():
    n = CHUNK + 3000
    x = torch.ones(n)
    check(None, [[x]] * 3, [5, CHUNK, n - 1], ties=("first",))
