"""Slices of tensors by the Triton backend: the bytes of the whole, whatever has to be known of it first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pymerge

from ..core.conftest import spec_of
from ..core.test_slices import UNIT, any_case, check
from .conftest import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def by_triton():
    with pymerge.backend("triton"):
        yield


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_choice_together(data):
    check(*any_case(data, 3, 9000), [UNIT], device=DEVICE)


@pytest.mark.parametrize("sparsify", ["magnitude", "bernoulli"])
def test_chunks_that_do_not_begin_with_the_slice(sparsify):
    """Slices begin at multiples of 4096 elements, chunks of a launch have 16384."""
    torch.manual_seed(1)
    base, model = (torch.randn(5 * UNIT + 77).bfloat16() for _ in range(2))
    spec = spec_of(1, sparsify, sparsify == "magnitude", rescale="norm", zero_vote="majority")
    check(spec, base, [model], torch.bfloat16, [UNIT, 5 * UNIT], device=DEVICE)
