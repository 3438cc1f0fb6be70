"""The fused Triton kernel against the reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from pymerge import reference, triton_backend
from pymerge.conventions import _CHOICES, Convention
from pymerge.spec import MergeSpec
from pymerge.triton_kernels.launch import BLOCK, CHUNK

from ..core.conftest import HOSTILE, assert_same_bits, models_of, spec_of, unaligned
from .conftest import DTYPES, poisoned, there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(base, models, spec, dtype, name="layer.weight", **outside):
    out = poisoned(models[0].numel(), dtype)
    triton_backend.merge(there(base), [there(x) for x in models], spec, out, name=name, **outside)
    assert_same_bits(out.cpu(), reference.merge(base, models, spec, name=name, dtype=dtype, **outside))


@pytest.mark.parametrize("sparsify", ["none", "magnitude", "band", "bernoulli"])
def test_small_lengths(sparsify):
    torch.manual_seed(1)
    whole = models_of("normal", 70, 3, torch.bfloat16)
    for n in (*range(20), 31, 32, 33, *range(62, 71)) if sparsify in ("none", "bernoulli") else (0, 1, 2, 3, 15, 16, 17, 33, 70):
        check(whole[0][:n], [whole[1][:n], whole[2][:n]], spec_of(2, sparsify, n % 2 == 0), torch.bfloat16)


@pytest.mark.parametrize("sparsify", ["none", "magnitude", "band", "bernoulli"])
def test_lengths_around_blocks_and_chunks(sparsify):
    torch.manual_seed(2)
    for n in (BLOCK - 1, BLOCK, BLOCK + 1, CHUNK, CHUNK + 1):
        base, *models = models_of("normal", n, 3, torch.float32)
        check(base, models, spec_of(2, sparsify, True, rescale="norm" if n == CHUNK + 1 else "none"), torch.float32)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data(dtype, kind):
    torch.manual_seed(3)
    base, *models = models_of(kind, 1203, 4, dtype)
    for sparsify, elect, zero_vote, rescale in (
        ("none", True, "majority", "none"),
        ("magnitude", False, "drop", "none"),
        ("band", True, "positive", "norm"),
        ("bernoulli", True, "positive", "density"),
    ):
        check(base, models, spec_of(3, sparsify, elect, zero_vote=zero_vote, rescale=rescale, divisor="count"), dtype)


def test_unaligned_addresses(dtype):
    torch.manual_seed(4)
    for offset in (0, 1, 3):
        tensors = [there(unaligned(torch.randn(1500).to(dtype), (offset * (i + 1)) % 9)) for i in range(3)]
        storage = poisoned(1500 + 2 * offset, dtype)
        out = storage[offset : offset + 1500]
        spec = spec_of(2, "magnitude", True)
        triton_backend.merge(tensors[0], tensors[1:], spec, out)
        assert_same_bits(out.cpu(), reference.merge(tensors[0].cpu(), [t.cpu() for t in tensors[1:]], spec, dtype=dtype))
        assert bool(storage[:offset].isnan().all()) and bool(storage[offset + 1500 :].isnan().all())


@pytest.mark.parametrize("count", [1, 2, 8, 9, 64])
def test_number_of_models(count):
    torch.manual_seed(5)
    base, *models = models_of("few_values", 300, count + 1, torch.float16)
    for sparsify, divisor in (("magnitude", "weights"), ("none", "count"), ("bernoulli", "none")):
        check(base, models, spec_of(count, sparsify, True, divisor=divisor), torch.float16)
    check(None, models, spec_of(count, "none", False), torch.float32)
    check(None, models, spec_of(count, "bernoulli", False, divisor="count"), torch.float32)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_choice_together(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(1, 4))
    n = data.draw(st.integers(0, 1100))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=count + 2, max_size=count + 2))
    kinds = data.draw(st.lists(st.sampled_from(sorted(HOSTILE)), min_size=count + 1, max_size=count + 1))
    tensors = [HOSTILE[k](n).to(d) for k, d in zip(kinds, dtypes, strict=False)]
    base = tensors[0] if data.draw(st.booleans()) else None
    number = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 3))
    sparsify = data.draw(st.sampled_from(["none", "magnitude", "band", "bernoulli"]))
    spec = MergeSpec(
        tuple(data.draw(number) for _ in range(count)),
        tuple(data.draw(st.sampled_from([0.0, 1e-3, 0.29, 0.5, 0.9, 1.0])) for _ in range(count)),
        sparsify,
        data.draw(st.booleans()),
        Convention(**{k: data.draw(st.sampled_from(v)) for k, v in _CHOICES.items()}),
        data.draw(number),
        data.draw(st.integers(0, 2**64 - 1)),
        tuple(data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])) for _ in range(count)) if sparsify == "band" else (),
    )
    name = data.draw(st.text(max_size=8))
    check(base, tensors[1:], spec, dtypes[-1], name)
    if spec.elect:
        balance = triton_backend.vote_balance(there(base), [there(t) for t in tensors[1:]], spec, name=name)
        assert balance == reference.vote_balance(base, tensors[1:], spec, name=name)


def test_selection_and_balance_from_outside():
    torch.manual_seed(7)
    base, *models = models_of("few_values", 2000, 4, torch.bfloat16)
    spec = spec_of(3, "magnitude", True, zero_vote="majority")
    key = int(reference._keys(torch.tensor([1.0]))[0])
    selection = torch.tensor([[key, 1500], [key, -1], [2**63 - 1, -1]])
    for balance in (-3, 0, 5):
        check(base, models, spec, torch.bfloat16, selection=selection, balance=balance)


def test_many_tensors_of_several_dtypes():
    torch.manual_seed(8)
    spec = spec_of(2, "bernoulli", True, zero_vote="majority", rescale="density")
    jobs, wanted = [], []
    for i, n in enumerate((5, 0, 1024, 33, 20_000, 7, 1, 3000)):
        dtype = (torch.bfloat16, torch.float32)[i % 2]
        base, *models = models_of("few_values", n, 3, dtype)
        out = poisoned(n, dtype)
        jobs.append(triton_backend.MergeJob(there(base), [there(x) for x in models], out, f"layer.{i}"))
        wanted.append(reference.merge(base, models, spec, name=f"layer.{i}", dtype=dtype))
    assert bool(triton_backend.merge_many(jobs, spec))
    for job, want in zip(jobs, wanted):
        assert_same_bits(job.out.cpu(), want)


def test_reports_values_that_are_not_finite(dtype):
    spec = spec_of(2, "bernoulli", True, density=0.5)
    for n in (1, BLOCK + 1):
        for value in (float("nan"), float("-inf")):
            tensors = [there(torch.ones(n, dtype=dtype)) for _ in range(3)]
            out = poisoned(n, dtype)
            assert triton_backend.merge(tensors[0], tensors[1:], spec, out)
            for bad in tensors:
                bad[n - 1] = value
                assert not triton_backend.merge(tensors[0], tensors[1:], spec, out)
                bad[n - 1] = 1.0


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once_to_nearest_even(half):
    # Every 16th value, the points between neighbours, and a little to either side, from fp32 and fp64.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    finite = every[every.isfinite()].double().unique()
    between = ((finite[1:] + finite[:-1]) / 2)[::16]
    for compute in (torch.float32, torch.float64):
        sides = [torch.nextafter(between.to(compute), torch.tensor(s, dtype=compute)) for s in (-1e39, 1e39)]
        x = torch.cat([finite[::16].to(compute), between.to(compute), *sides])
        check(None, [x[x.isfinite()]], MergeSpec((1.0,), (1.0,), convention=Convention(divisor="none")), half)
