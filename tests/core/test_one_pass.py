"""TIES of one large tensor in a single pass, against the reference, bit for bit; where its guesses are bad above all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge import native, reference
from pymerge.conventions import Convention
from pymerge.spec import MergeSpec

from .conftest import HOSTILE, assert_same_bits, models_of, unaligned

N = (1 << 21) + 16384 + 77  # a little more than the least that is merged in one pass; not a whole number of vectors
HALVES_AND_SINGLE = [torch.bfloat16, torch.float16, torch.float32]


def ties(models, density=0.2, weights=None, scale=1.0, **convention):
    return MergeSpec(tuple(weights or (1.0,) * models), (density,) * models, "magnitude", True, Convention(**convention), scale)


def check(base, models, spec):
    """By every instruction set: the reference is what takes the time."""
    want = reference.merge(base, models, spec, dtype=models[0].dtype)
    for isa in native.available_isas():
        native.use_isa(isa)
        out = torch.full(models[0].shape, float("nan"), dtype=models[0].dtype)
        assert native.merge(base, models, spec, out)
        assert_same_bits(out, want)


@pytest.fixture(autouse=True)
def _any_isa():
    yield
    native.use_isa("")


def tuned(dtype, count, n=N):
    base = torch.randn(n) * 0.02
    return base.to(dtype), [(base + torch.randn(n) * 0.002).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
def test_ordinary_weights(dtype):
    torch.manual_seed(1)
    base, models = tuned(dtype, 3)
    for density in (0.2, 0.9, 0.001):
        check(base, models, ties(3, density))
    check(None, models, ties(3))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data(kind):
    torch.manual_seed(2)
    for dtype in (torch.bfloat16, torch.float32):
        top = torch.finfo(dtype).max
        base, *models = [x.clamp(-top, top) for x in models_of(kind, N, 3, dtype)]
        check(base, models, ties(2, 0.3))
        check(None, [base, *models], ties(3, 0.5, divisor="count", zero_vote="drop"))


def test_number_of_models():
    torch.manual_seed(3)
    base, models = tuned(torch.bfloat16, 9)
    for count in (1, 2, 4, 5, 9):
        check(base, models[:count], ties(count))
        check(base, models[:count], ties(count, weights=[0.3 * i - 0.5 for i in range(count)]))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_every_choice_together(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    count = data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from(HALVES_AND_SINGLE))
    base, models = tuned(dtype, count, N + data.draw(st.integers(0, 9000)))
    if data.draw(st.booleans()):  # rows of unlike sizes, so that neither a sample nor the first chunks speak for the rest
        rows = torch.linspace(0.1, 3, base.numel()) ** data.draw(st.integers(1, 3))
        models = [((x - base).float() * rows + base.float()).to(dtype) for x in models]
    spec = ties(
        count,
        data.draw(st.floats(0.0001, 0.9999)),
        data.draw(st.lists(st.sampled_from([1.0, 0.5, -0.7]), min_size=count, max_size=count)),
        data.draw(st.sampled_from([1.0, 0.3, -2.0])),
        vote_weighted=data.draw(st.booleans()),
        zero_vote=data.draw(st.sampled_from(["positive", "drop", "majority"])),
        divisor=data.draw(st.sampled_from(["weights", "count", "none"])),
        tie_break=data.draw(st.sampled_from(["first", "all"])),
        k=data.draw(st.sampled_from(["floor1", "floor", "paper", "complement"])),
    )
    check(base if data.draw(st.booleans()) else None, models, spec)


def test_a_sample_that_misleads():
    """Large values where no sample looks: in every chunk but those of the first stage, and behind each run of a sample."""
    torch.manual_seed(4)
    values = torch.rand(N)
    chunk = torch.arange(N) // 16384
    for stride in (3, 4, 8):
        hidden = torch.where(chunk % stride == 0, values, values + 2)
        check(None, [hidden, values], ties(2, 0.3))
    check(None, [torch.where(torch.arange(N) < N // 2, values, -values - 1), values], ties(2, 0.3))


def test_more_in_a_bracket_than_there_is_room_for():
    """Distinct magnitudes within a sample's error of each other, all in one part of the tensor."""
    values = torch.where(torch.arange(N) < N // 4, torch.linspace(1, 1.001, N), torch.where(torch.arange(N) % 2 == 0, 0.0, 9.0))
    for density in (0.3, 0.4, 0.55):
        check(None, [values, values.flip(0)], ties(2, density))


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
def test_sums_that_overflow(dtype):
    torch.manual_seed(5)
    top = torch.finfo(dtype).max
    models = [(torch.sign(torch.randn(N)) * torch.rand(N) * top).to(dtype) for _ in range(3)]
    check(None, models, ties(3, 0.6, divisor="none"))
    check(None, models, ties(3, 0.6, weights=[2.0, 3.0, 1.0], scale=0.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite(isa, value):
    torch.manual_seed(6)
    base, models = tuned(torch.bfloat16, 2)
    for at in (0, 16384 * 3 + 1, N - 1):
        bad = models[1].clone()
        bad[at] = value
        assert native.merge(base, [models[0], bad], ties(2), torch.empty_like(base)) is False


def test_outputs_off_alignment_and_threads_do_not_matter(isa):
    torch.manual_seed(7)
    base, models = tuned(torch.bfloat16, 3)
    want = reference.merge(base, models, ties(3), dtype=base.dtype)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for offset in (0, 1, 8, 31):
            out = unaligned(torch.full(base.shape, float("nan"), dtype=base.dtype), offset)
            native.merge(unaligned(base, offset + 3), models, ties(3), out)
            assert_same_bits(out, want)
