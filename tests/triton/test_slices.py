"""Slices of tensors by the Triton backend: the bytes of the whole, whatever has to be known of it first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pymerge

from ..core.conftest import HOSTILE, spec_of
from ..core.test_slices import UNIT, any_spec, check
from .conftest import DEVICE, DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def by_triton():
    with pymerge.backend("triton"):
        yield


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_choice_together(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(1, 3))
    n = data.draw(st.integers(0, 9000))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=count + 2, max_size=count + 2))
    kinds = data.draw(st.lists(st.sampled_from(sorted(HOSTILE)), min_size=count + 1, max_size=count + 1))
    tensors = [HOSTILE[k](n).clamp(-6e4, 6e4).to(d) for k, d in zip(kinds, dtypes, strict=False)]
    base = tensors[0] if data.draw(st.booleans()) else None
    check(any_spec(data, count), base, tensors[1:], dtypes[-1], [UNIT], device=DEVICE)


@pytest.mark.parametrize("sparsify", ["magnitude", "bernoulli"])
def test_chunks_that_do_not_begin_with_the_slice(sparsify):
    """Slices begin at multiples of 4096 elements, chunks of a launch have 16384."""
    torch.manual_seed(1)
    base, model = (torch.randn(5 * UNIT + 77).bfloat16() for _ in range(2))
    spec = spec_of(1, sparsify, sparsify == "magnitude", rescale="norm", zero_vote="majority")
    check(spec, base, [model], torch.bfloat16, [UNIT, 5 * UNIT], device=DEVICE)
