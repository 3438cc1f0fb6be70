"""The C++ merge against the reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge import native, reference
from pymerge.conventions import _CHOICES, Convention
from pymerge.spec import MergeSpec

from .conftest import DTYPES, HOSTILE, assert_same_bits, models_of, spec_of, unaligned


def check(base, models, spec, dtype, name="layer.weight"):
    out = torch.full(models[0].shape, float("nan"), dtype=dtype)
    native.merge(base, models, spec, out, name=name)
    assert_same_bits(out, reference.merge(base, models, spec, name=name, dtype=dtype))


@pytest.mark.parametrize("sparsify", ["none", "magnitude", "band", "bernoulli"])
@pytest.mark.parametrize("elect", [False, True])
def test_every_length_from_0_to_1030(isa, sparsify, elect):
    torch.manual_seed(1)
    whole = [torch.randn(1031).bfloat16() for _ in range(3)]
    spec = spec_of(2, sparsify, elect)
    for n in range(1031):
        check(whole[0][:n], [whole[1][:n], whole[2][:n]], spec, torch.bfloat16)


@pytest.mark.parametrize("sparsify", ["none", "magnitude", "band", "bernoulli"])
def test_lengths_around_blocks_and_chunks(isa, sparsify):
    torch.manual_seed(2)
    for n in (4095, 4096, 4097, 65535, 65536, 65537, 131072 + 77):
        x = [torch.randn(n) for _ in range(3)]
        check(x[0], x[1:], spec_of(2, sparsify, True, rescale="norm"), torch.float32)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("sparsify", ["none", "magnitude", "band", "bernoulli"])
def test_hostile_data(isa, dtype, kind, sparsify):
    torch.manual_seed(3)
    base, *models = models_of(kind, 1003, 4, dtype)
    for elect in (False, True):
        for zero_vote in ("positive", "majority", "drop"):
            check(base, models, spec_of(3, sparsify, elect, zero_vote=zero_vote, divisor="count"), dtype)


def test_unaligned_pointers(isa, dtype):
    torch.manual_seed(4)
    for offset in range(9):
        tensors = [unaligned(torch.randn(500).to(dtype), (offset + i) % 9) for i in range(3)]
        out = unaligned(torch.full((500,), float("nan"), dtype=dtype), offset)
        spec = spec_of(2, "magnitude", True)
        native.merge(tensors[0], tensors[1:], spec, out)
        assert_same_bits(out, reference.merge(tensors[0], tensors[1:], spec, dtype=dtype))


def test_large_outputs_are_stored_past_the_cache_and_are_the_same(isa):
    torch.manual_seed(5)
    n = (4 << 20) // 2 + 100  # from 4 MiB on
    tensors = [torch.randn(n + 3).bfloat16() for _ in range(3)]
    for offset in (0, 1):
        base, *models = [t[offset : offset + n] for t in tensors]
        out = unaligned(torch.full((n,), float("nan"), dtype=torch.bfloat16), offset)
        spec = spec_of(2, "none", True)
        native.merge(base, models, spec, out)
        assert_same_bits(out, reference.merge(base, models, spec, dtype=torch.bfloat16))


@pytest.mark.parametrize("count", [1, 2, 5, 17, 64])
def test_number_of_models(isa, count):
    torch.manual_seed(6)
    base, *models = models_of("few_values", 700, count + 1, torch.float16)
    for divisor in ("weights", "count", "none"):
        check(base, models, spec_of(count, "magnitude", True, divisor=divisor), torch.float16)
        check(None, models, spec_of(count, "none", False, divisor=divisor), torch.float32)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_choice_together(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(1, 6))
    n = data.draw(st.integers(0, 3000))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=count + 2, max_size=count + 2))
    kinds = data.draw(st.lists(st.sampled_from(sorted(HOSTILE)), min_size=count + 1, max_size=count + 1))
    tensors = [HOSTILE[k](n).to(d) for k, d in zip(kinds, dtypes, strict=False)]
    base = tensors[0] if data.draw(st.booleans()) else None
    choices = {k: data.draw(st.sampled_from(v)) for k, v in _CHOICES.items()}
    number = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 3))
    sparsify = data.draw(st.sampled_from(["none", "magnitude", "band", "bernoulli"]))
    spec = MergeSpec(
        tuple(data.draw(number) for _ in range(count)),
        tuple(data.draw(st.sampled_from([0.0, 1e-3, 0.29, 0.5, 0.9, 1.0])) for _ in range(count)),
        sparsify,
        data.draw(st.booleans()),
        Convention(**choices),
        data.draw(number),
        data.draw(st.integers(0, 2**64 - 1)),
        tuple(data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])) for _ in range(count)) if sparsify == "band" else (),
    )
    name = data.draw(st.text(max_size=8))
    for isa in native.available_isas():
        native.use_isa(isa)
        check(base, tensors[1:], spec, dtypes[-1], name)
        if spec.elect:
            assert native.vote_balance(base, tensors[1:], spec, name=name) == reference.vote_balance(base, tensors[1:], spec, name=name)
    native.use_isa("")


def test_selection_and_balance_from_outside(isa):
    torch.manual_seed(7)
    base, *models = models_of("few_values", 2000, 4, torch.bfloat16)
    spec = spec_of(3, "magnitude", True, zero_vote="majority")
    key = int(reference._keys(torch.tensor([1.0]))[0])
    selection = torch.tensor([[key, 17], [key, -1], [2**63 - 1, -1]])
    for balance in (-3, 0, 5):
        out = torch.empty(2000, dtype=torch.bfloat16)
        native.merge(base, models, spec, out, selection=selection, balance=balance)
        want = reference.merge(base, models, spec, selection=selection, balance=balance, dtype=torch.bfloat16)
        assert_same_bits(out, want)


@pytest.mark.parametrize("sparsify, density", [("bernoulli", 0.5), ("magnitude", 0.5), ("magnitude", 1e-6)], ids=str)
def test_reports_values_that_are_not_finite(isa, dtype, sparsify, density):
    """Of a density so small that nothing is kept, too."""
    spec = MergeSpec((1.0, 1.0), (density, density), sparsify, True, Convention(k="floor"))
    for n in (1, 15, 16, 17, 1000, 70000):
        for value in (float("nan"), float("inf"), float("-inf")):
            tensors = [torch.ones(n, dtype=dtype) for _ in range(3)]
            out = torch.empty(n, dtype=dtype)
            assert native.merge(tensors[0], tensors[1:], spec, out)
            for bad in tensors:
                bad[n - 1] = value
                assert not native.merge(tensors[0], tensors[1:], spec, out)
                bad[n - 1] = 1.0


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("sparsify, density", [("none", 1.0), ("magnitude", 0.6)])
def test_what_is_not_finite_spoils_no_other_element(isa, dtype, elect, sparsify, density):
    torch.manual_seed(9)
    nan, inf, largest = float("nan"), float("inf"), torch.finfo(dtype).max
    for n in (40, 1024, 2100):
        base, *models = [torch.randn(n).to(dtype) for _ in range(3)]
        models[0][n // 2], models[1][n - 1], models[1][n // 3], base[n // 4], base[3] = nan, inf, -inf, inf, -largest
        models[0][3] = largest  # a delta that overflows
        for weights, scale in [((1.0, 1.0), 1.0), ((0.0, 2.0), 0.0)]:
            spec = MergeSpec(weights, (density, density), sparsify, elect=elect, scale=scale)
            out, want = torch.full((n,), 7.0, dtype=dtype), reference.merge(base, models, spec, name="", dtype=dtype)
            assert not native.merge(base, models, spec, out)
            assert torch.equal(out.isnan(), want.isnan())
            assert_same_bits(out.nan_to_num(nan=1.0), want.nan_to_num(nan=1.0))


def test_halves_are_rounded_once_to_nearest_even(isa):
    # Every fp16 and bf16 value, and the points between neighbours, a little to either side, from fp32 and fp64.
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = every[every.isfinite()].double().unique()
        between = (finite[1:] + finite[:-1]) / 2
        for compute in (torch.float32, torch.float64):
            points = [finite, between, *(torch.nextafter(between.to(compute), torch.tensor(s, dtype=compute)) for s in (-1e39, 1e39))]
            x = torch.cat([p.to(compute) for p in points])
            x = x[x.isfinite()]
            out = torch.empty(x.shape, dtype=dtype)
            native.merge(None, [x], MergeSpec((1.0,), (1.0,), convention=Convention(divisor="none")), out)
            exact = x.double()
            low = finite[(torch.searchsorted(finite, exact, right=True) - 1).clamp(0, len(finite) - 1)]
            assert_same_bits(out.abs(), reference.round_to(x, dtype).abs())
            error = (out.double() - exact).abs()
            inside = out.isfinite() & (exact >= finite[0])
            assert bool((error[inside] <= (low - exact).abs()[inside]).all())


def test_a_selection_never_depends_on_threads_or_flushing(isa):
    torch.manual_seed(8)
    base, *models = models_of("subnormal", 400_000, 4, torch.float32)
    spec = spec_of(3, "magnitude", True, density=0.1)
    want = reference.merge(base, models, spec, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = torch.empty(400_000)
            native.merge(base, models, spec, out)
            assert_same_bits(out, want)
        if torch.set_flush_denormal(True):
            native.merge(base, models, spec, out)
            torch.set_flush_denormal(False)
            assert_same_bits(out, want)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
