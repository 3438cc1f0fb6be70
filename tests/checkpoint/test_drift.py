"""How far two checkpoints are apart: against plain fp64 arithmetic, for every dtype, every size around a piece, and odd content."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pymerge.checkpoint import drift
from pymerge.checkpoint.drift import diff
from pymerge.checkpoint.groups import in_order, kind_of, layer_of, stack_of
from tests.checkpoint.files import save_model, tensors_of


def compare(folder, a, b):
    for name, tensors in (("a", a), ("b", b)):
        save_file(tensors, folder / f"{name}.safetensors")
    return diff(folder / "a.safetensors", folder / "b.safetensors")


def expected(x, y):
    """Relative drift, largest difference and cosine, in fp64."""
    x, y = x.double().flatten(), y.double().flatten()
    return (x - y).norm() / y.norm(), (x - y).abs().max(), torch.dot(x, y) / (x.norm() * y.norm())


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    pair=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 99),
)
def test_agrees_with_plain_arithmetic(tmp_path_factory, sizes, pair, seed):
    g = torch.Generator().manual_seed(seed)
    a = {f"layers.{i}.w": torch.randn(n, generator=g).to(pair[0]) for i, n in enumerate(sizes)}
    b = {name: (x.float() + 0.1 * torch.randint(0, 2, x.shape, generator=g)).to(pair[1]) for name, x in a.items()}
    before = drift.PIECE
    drift.PIECE = 256  # so that tensors have several pieces
    try:
        result = compare(tmp_path_factory.mktemp("drift"), a, b)
    finally:
        drift.PIECE = before
    for tensor in result.tensors:
        x, y = a[tensor.name], b[tensor.name]
        relative, largest, cosine = expected(x, y)
        assert tensor.relative == pytest.approx(relative.item(), rel=1e-5, abs=1e-12)
        assert tensor.max_abs == pytest.approx(largest.item(), rel=1e-6)
        assert tensor.cosine == pytest.approx(cosine.item(), abs=1e-6)
        bits = [t.view(torch.uint8).view(len(x), -1) for t in (x, y)]
        assert tensor.changed == int((bits[0] != bits[1]).any(1).sum() if x.dtype == y.dtype else (x.double() != y.double()).sum())
    whole = result.total
    relative, largest, cosine = expected(torch.cat([x.double() for x in a.values()]), torch.cat([x.double() for x in b.values()]))
    assert whole.relative == pytest.approx(relative.item(), rel=1e-5, abs=1e-12) and whole.max_abs == pytest.approx(
        largest.item(), rel=1e-6
    )
    assert result.equal == (pair[0] == pair[1] and all(torch.equal(a[n], b[n]) for n in a))


def test_same_numbers_for_any_number_of_threads(tmp_path):
    g = torch.Generator().manual_seed(0)
    a = {"w": torch.randn(3 * drift.PIECE + 5, generator=g).bfloat16()}
    b = {"w": torch.randn(3 * drift.PIECE + 5, generator=g).bfloat16()}
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(compare(tmp_path, a, b))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_what_only_one_has_and_what_cannot_be_compared(tmp_path):
    def tensors(**others):
        return {"same": torch.ones(2), "empty": torch.ones(0), **others}

    ids = torch.arange(6)
    result = compare(
        tmp_path,
        tensors(mine=torch.ones(2), shape=torch.ones(2, 2), ids=ids, kind=torch.ones(3)),
        tensors(yours=torch.ones(2), shape=torch.ones(4), ids=ids // 3 * 3, kind=torch.ones(3).int()),
    )
    assert [i.name for i in result.only_in_a] == ["mine"] and [i.name for i in result.only_in_b] == ["yours"]
    assert [(x.shape, y.shape) for x, y in result.reshaped] == [((2, 2), (4,))]
    found = {t.name: t for t in result.tensors}
    assert (found["ids"].changed, found["ids"].relative) == (4, 0.0), "integers have no drift, but they have changes"
    assert found["kind"].changed == 3, "floats and integers are never the same"
    assert (found["same"].changed, found["empty"].changed, found["empty"].changed_fraction) == (0, 0, 0.0)
    assert not result.equal


def test_values_without_a_ratio(tmp_path):
    nan = torch.tensor([1.0, math.nan])
    result = compare(
        tmp_path,
        {"nan": nan, "zero": torch.zeros(2), "from_zero": torch.ones(2), "sign": -torch.zeros(2)},
        {"nan": nan, "zero": torch.zeros(2), "from_zero": torch.zeros(2), "sign": torch.zeros(2)},
    )
    found = {t.name: t for t in result.tensors}
    assert found["nan"].changed == 0 and math.isnan(found["nan"].relative), "the same bits, and yet no number"
    assert (found["zero"].relative, found["zero"].cosine) == (0.0, 1.0)
    assert math.isinf(found["from_zero"].relative) and math.isnan(found["from_zero"].cosine)
    assert (found["sign"].changed, found["sign"].relative) == (2, 0.0), "-0.0 is another pattern of bits"


def test_reads_each_byte_once(tmp_path, monkeypatch):
    from pymerge.checkpoint.reader import Checkpoint

    a, b = save_model(tmp_path / "a", tensors_of(0), 2), save_model(tmp_path / "b", tensors_of(1, torch.bfloat16))
    read, original = [], Checkpoint.read_into

    def counted(self, info, target, start=0):
        read.append(len(target))
        return original(self, info, target, start)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    seen = []
    diff(a, b, progress=lambda done, total: seen.append((done, total)))
    total = sum(x.nbytes for x in tensors_of(0).values()) * 3 // 2
    assert sum(read) == total and seen[-1] == (total, total)


def test_groups():
    name = "model.layers.10.mlp.experts.3.w1.weight"
    assert (layer_of(name), stack_of(name), kind_of(name)) == (
        "model.layers.10", ("model.layers", 10), "model.layers.*.mlp.experts.*.w1.weight",
    )  # fmt: skip
    assert (layer_of("lm_head.weight"), layer_of("bias"), stack_of("conv2d.weight")) == ("lm_head", "bias", None)
    assert (layer_of("0.weight"), stack_of("0.weight")) == ("0", ("", 0))
    assert sorted(["h.10.w", "h.9.w", "a.w", "h.x"], key=in_order) == ["a.w", "h.x", "h.9.w", "h.10.w"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from pymerge.checkpoint.drift_plot import plot_drift

    layered = diff(save_model(tmp_path / "a", tensors_of(0)), save_model(tmp_path / "b", tensors_of(1)))
    flat = compare(tmp_path, {"w": torch.ones(3)}, {"w": torch.zeros(3) + 2})
    for i, result in enumerate((layered, flat)):
        file = tmp_path / f"{i}.{suffix}"
        plot_drift(result, file, "a from b")
        assert file.stat().st_size > 2000
    if suffix == "svg":
        text = (tmp_path / "0.svg").read_text()
        assert text.count("<!-- ") > 10 and "relative drift" in text and "mlp.up_proj.weight" in text
