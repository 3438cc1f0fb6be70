"""The diagnostics' reduction: every instruction set against the oracle, bit for bit, and the oracle against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pymerge import diagnose_ops, native, native_diagnose, reference, reference_diagnose

from .conftest import DTYPES, HOSTILE, unaligned


def statistics(function, base, models, selection, times=1):
    sums, counts = diagnose_ops.new_statistics(len(models))
    for _ in range(times):
        function(base, models, selection, sums, counts)
    return sums, counts


def assert_same(base, models, selection, times=1):
    want = statistics(reference_diagnose.diagnose, base, models, selection, times)
    got = statistics(native_diagnose.diagnose, base, models, selection, times)
    assert got[0].tolist() == want[0].tolist()
    assert got[1].tolist() == want[1].tolist()


def test_by_hand():
    base = torch.tensor([1.0, 2.0, 0.0, -1.0])
    models = [base + torch.tensor([1.0, -2.0, 0.0, 4.0]), base + torch.tensor([-1.0, -1.0, 3.0, 0.5])]
    everything, four, three = torch.tensor([[0, 3], [0, 3]]), 0x40800000, 0x40400000
    for function in (reference_diagnose.diagnose, native_diagnose.diagnose):
        sums, counts = statistics(function, base, models, everything)
        assert sums.tolist() == [6, -7, -3.5, 21, 3, 11.25, 7, 5.5, 0 + 3 + 3 + 4.5]
        assert counts.tolist() == [3, 4, 3, 4, four, three, 3, 1, 3, 1]
        top = reference.select([base], [[m] for m in models], [2, 2])
        assert statistics(function, base, models, top)[1].tolist() == [3, 4, 2, 2, four, three, 0, 0, 0, 0]


def test_sizes(isa, dtype):
    torch.manual_seed(0)
    for n in (0, 1, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 70_001):
        base = torch.randn(n).to(dtype)
        models = [(base + 0.1 * torch.randn(n).to(dtype)).to(dtype) for _ in range(3)]
        selection = reference.select([base], [[m] for m in models], [n // 5, n // 2, n])
        assert_same(base, models, selection)
        assert_same(unaligned(base, 1), [unaligned(m, 3) for m in models], selection)
        assert_same(None, models, reference.select(None, [[m] for m in models], [n // 5] * 3))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data(isa, kind):
    torch.manual_seed(1)
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float64)):
        base, models = HOSTILE[kind](5000).to(dtypes[0]), [HOSTILE[kind](5000).to(dtypes[i % 2]) for i in range(3)]
        for tie_break in ("first", "all"):
            assert_same(base, models, reference.select([base], [[m] for m in models], [1000, 0, 5000], tie_break))


@given(st.data())
def test_any_input(data):
    """Any sizes, numbers of models, dtypes, selections; continued onto statistics that are there already."""
    n, count = data.draw(st.integers(0, 9000)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    steps = data.draw(st.integers(1, 100))

    def tensor():
        return (torch.randint(-steps, steps + 1, (n,), generator=generator) / 7).to(data.draw(st.sampled_from(DTYPES)))

    base = data.draw(st.sampled_from([None, "given"])) and tensor()
    models = [tensor() for _ in range(count)]
    counts = [data.draw(st.integers(0, n)) for _ in range(count)]
    selection = reference.select(None if base is None else [base], [[m] for m in models], counts)
    native.use_isa(data.draw(st.sampled_from(native.available_isas())))
    try:
        assert_same(base, models, selection, times=2)
    finally:
        native.use_isa("")


@pytest.mark.parametrize("exponent", [-149, -80, -41, -40, 0, 49, 50, 51, 126])
def test_sums_of_any_size_are_near_the_exact_ones(isa, exponent):
    """2^-17 of the product of the norms, whether a block is added in fp32 or, of extreme numbers, in fp64."""
    torch.manual_seed(4)
    n, scale = 3 * 4096 + 100, 2.0**exponent
    vectors = [torch.rand(n, dtype=torch.float64) * 2 - 1 for _ in range(4)]
    vectors[3] = vectors[2] + 1e-3 * vectors[3]
    base, *deltas = [(v / v.abs().max() * scale).float() for v in vectors]
    base[4096:8192] = 0
    models = [base + d for d in deltas]
    deltas = [(m - base).double() for m in models]
    selection = torch.tensor([[0, n]] * 3)
    assert_same(base, models, selection)
    sums = statistics(native_diagnose.diagnose, base, models, selection)[0].tolist()
    exact = [base.double(), *deltas]
    for a in range(4):
        for b in range(a, 4):
            want = float((exact[a] * exact[b]).sum())
            assert abs(sums.pop(0) - want) <= 2**-17 * float(exact[a].norm() * exact[b].norm()), (a, b)
    norms = [float(d.abs().sum()) for d in deltas]
    for got, want in zip(sums, [*norms, float(sum(deltas).abs().sum())], strict=True):
        assert abs(got - want) <= 2**-17 * sum(norms)


def test_infinities_and_nans_are_seen(isa):
    """Sums that are not finite say so; counts and the other models' sums are as ever."""
    for wrong in (math.inf, -math.inf, math.nan):
        for n in (100, 5000):
            models = [torch.ones(n), torch.ones(n)]
            models[1][7] = wrong
            for base in (torch.zeros(n), None):
                sums, counts = statistics(native_diagnose.diagnose, base, models, torch.tensor([[0, n]] * 2))
                want = statistics(reference_diagnose.diagnose, base, models, torch.tensor([[0, n]] * 2))
                assert not math.isfinite(sums[5]) and sums[3] == n
                assert counts.tolist() == want[1].tolist()


def test_threads_and_pieces_do_not_matter():
    """A tensor at once, with any number of threads, or cut at multiples of a piece: the same bytes."""
    torch.manual_seed(2)
    n = 5 * diagnose_ops.PIECE + 12_345
    base = torch.randn(n).bfloat16()
    models = [(base + 0.01 * torch.randn(n)).bfloat16() for _ in range(2)]
    selection = torch.tensor([[0x3C000000, n // 2], [0x3C000000, -1]])
    whole = statistics(lambda *a: native_diagnose.diagnose(*a, threads=1), base, models, selection)
    several = statistics(lambda *a: native_diagnose.diagnose(*a, threads=5), base, models, selection)
    sums, counts = diagnose_ops.new_statistics(2)
    for start in range(0, n, diagnose_ops.PIECE):
        part = slice(start, start + diagnose_ops.PIECE)
        native_diagnose.diagnose(base[part], [m[part] for m in models], selection - torch.tensor([0, start]), sums, counts)
    for other in (several, (sums, counts)):
        assert other[0].tolist() == whole[0].tolist() and other[1].tolist() == whole[1].tolist()
    want = statistics(reference_diagnose.diagnose, base, models, selection)
    assert want[0].tolist() == whole[0].tolist() and want[1].tolist() == whole[1].tolist()


def test_many_models(isa):
    torch.manual_seed(3)
    base, models = torch.randn(700), [torch.randn(700) for _ in range(64)]
    assert_same(base, models, torch.tensor([[0x3F800000, -1]] * 64))


def test_operator(each_backend):
    base, models = torch.randn(30, 40), [torch.randn(40, 30).t() for _ in range(2)]
    selection = torch.tensor([[0, 1199], [0, 1199]])
    sums, counts = statistics(diagnose_ops.diagnose, base, models, selection)
    delta = (models[0] - base).double()
    assert sums[3].item() == pytest.approx(float((delta * delta).sum()))
    assert counts[0] == counts[2] == 1200
    with pytest.raises(ValueError, match="shapes differ"):
        statistics(diagnose_ops.diagnose, base, [base[:1]], selection[:1])
    with pytest.raises(ValueError, match="0 models"):
        diagnose_ops.diagnose(base, [], selection[:0], sums, counts)
