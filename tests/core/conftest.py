"""Fixtures of the C++ core's tests: every instruction set that this CPU has, and data that has broken kernels before."""

import pytest
import torch

from pymerge import native
from pymerge.conventions import Convention
from pymerge.spec import MergeSpec


@pytest.fixture(autouse=True)
def several_threads():
    """More threads than the test runner allows itself, so that work is really divided."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=native.available_isas())
def isa(request):
    native.use_isa(request.param)
    yield request.param
    native.use_isa("")


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


def _alternating(n: int) -> torch.Tensor:
    return torch.where(torch.arange(n) % 2 == 0, 1.0, -2.0).double()


# Each takes a length and gives fp64 values.
HOSTILE = {
    "normal": lambda n: torch.randn(n, dtype=torch.float64),
    "constant": lambda n: torch.full((n,), 0.5, dtype=torch.float64),
    "zero": lambda n: torch.zeros(n, dtype=torch.float64),
    "minus_zero": lambda n: torch.full((n,), -0.0, dtype=torch.float64),
    "two_values": _alternating,
    "few_values": lambda n: torch.randint(-3, 4, (n,)).double(),
    "sorted": lambda n: torch.arange(n).double() / max(n, 1),
    "reversed": lambda n: torch.arange(n, 0, -1).double() / max(n, 1),
    "largest_last": lambda n: torch.where(torch.arange(n) == n - 1, 9.0, 1.0).double(),
    "spike_in_front": lambda n: torch.where(torch.arange(n) < n // 8, torch.rand(n) + 5, torch.rand(n)).double(),
    "subnormal": lambda n: torch.randn(n, dtype=torch.float64) * 1e-39,
    "huge_range": lambda n: torch.randn(n, dtype=torch.float64) * torch.exp(torch.randn(n, dtype=torch.float64) * 3),
    "bf16_step": lambda n: (torch.randn(n) * 3e-4).bfloat16().double(),
}


def spec_of(models, sparsify, elect, density=0.3, scale=0.7, **convention):
    weights = tuple((1.0, 0.7, -0.4, 1.3)[i % 4] for i in range(models))
    gammas = tuple((0.0, 0.1, 0.6, 0.9)[i % 4] for i in range(models)) if sparsify == "band" else ()
    return MergeSpec(weights, (density,) * models, sparsify, elect, Convention(**convention), scale, seed=2**63 + 12345, gammas=gammas)


def models_of(kind, n, count, dtype):
    return [HOSTILE[kind](n).to(dtype) for _ in range(count)]


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bit patterns, all NaNs alike (their payload is not specified)."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.where(t.isnan(), torch.full_like(t, float("nan")), t).view(integer)


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    different = torch.nonzero(bits(got) != bits(want)).reshape(-1)
    if len(different):
        i = int(different[0])
        raise AssertionError(f"{len(different)} of {got.numel()} differ, first at {i}: got {got[i].item()!r}, want {want[i].item()!r}")


def unaligned(t: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values at an address `offset` elements off an aligned one."""
    return torch.cat([torch.zeros(offset, dtype=t.dtype), t])[offset:]
