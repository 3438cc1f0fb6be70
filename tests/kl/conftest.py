"""Fixtures of the divergences' tests."""

import pytest
import torch

from pymerge import kl_ops, native

KINDS = kl_ops.KINDS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def several_threads():
    """More threads than the test runner allows itself, so that rows are really divided."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=native.available_isas())
def isa(request):
    native.use_isa(request.param)
    yield request.param
    native.use_isa("")


def logits(*shape, seed=0, spread=3.0, apart=1.0, dtype=torch.float32):
    """Student and teacher: related, the teacher 20 higher, which changes no probability."""
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(*shape, generator=generator)
    teacher = student + apart * torch.randn(*shape, generator=generator) + 20
    return student.to(dtype), teacher.to(dtype)
