"""Whole-tensor sums, interpolation and the random numbers of the Triton backend."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from pymerge import reference, triton_backend
from pymerge.triton_kernels.philox import draws

from ..core.conftest import HOSTILE, assert_same_bits, unaligned
from .conftest import DEVICE, DTYPES, poisoned, there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_dots_follow_the_one_order(dtype):
    torch.manual_seed(0)
    for n in (0, 1, 63, 64, 65, 4095, 4096, 4097, 8 * 4096 + 5):
        a, b = torch.randn(n).to(dtype), HOSTILE["huge_range"](n).clamp(-1e4, 1e4).to(torch.float32)
        assert triton_backend.dots(there(a), there(b)).tolist() == reference.dots(a, b).tolist()


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.5, 0.999, 1.0])
def test_lerp(alpha):
    torch.manual_seed(1)
    for n in (0, 1, 17, 1500):
        for da in DTYPES:
            for db in (torch.float32, torch.bfloat16, torch.float64):
                a, b = torch.randn(n).to(da), unaligned(torch.randn(n).to(db), n % 2)
                out = poisoned(n, torch.bfloat16)
                assert triton_backend.lerp(there(a), there(b), alpha, out)
                assert_same_bits(out.cpu(), reference.lerp(a, b, alpha, torch.bfloat16))
                inplace = there(a.clone())
                triton_backend.lerp(inplace, there(b), alpha, inplace)
                assert_same_bits(inplace.cpu(), reference.lerp(a, b, alpha, da))


def test_lerp_of_many_pairs():
    torch.manual_seed(2)
    pairs = [(torch.randn(n).to(d), torch.randn(n).bfloat16()) for n in (3, 0, 2000, 17_000) for d in (torch.float32, torch.bfloat16)]
    outs = [poisoned(len(a), a.dtype) for a, _ in pairs]
    assert triton_backend.lerp_many([(there(a), there(b), out) for (a, b), out in zip(pairs, outs)], 0.2)
    for (a, b), out in zip(pairs, outs):
        assert_same_bits(out.cpu(), reference.lerp(a, b, 0.2, a.dtype))
    pairs[4][0][5:6] = float("inf")
    assert not triton_backend.lerp_many([(there(a), there(b), out) for (a, b), out in zip(pairs, outs)], 0.2)


@triton.jit
def _draws_kernel(out, first, seed, tensor, model, BLOCK: tl.constexpr):
    words = tl.load(seed)
    group = (tl.load(first) >> 2) + tl.arange(0, BLOCK // 4)
    drawn = draws(group, words, tl.load(tensor), tl.load(model), [BLOCK])
    tl.store(out + tl.arange(0, BLOCK), drawn.to(tl.int64))


def test_draws_are_the_reference_s():
    def word(x):
        return torch.tensor([x - 2**64 if x >= 2**63 else x], dtype=torch.int64, device=DEVICE)

    for first, seed, tensor, model in ((0, 0, 0, 0), (2**36 + 64, 2**64 - 3, 2**32 - 1, 63), (2**34 - 128, 2**63 + 17, 12345, 2)):
        out = torch.zeros(256, dtype=torch.int64, device=DEVICE)
        _draws_kernel[(1,)](out, word(first), word(seed), word(tensor), word(model), BLOCK=256)
        assert out.cpu().tolist() == reference.draws(first, first + 256, tensor, model, seed, torch.device("cpu")).tolist()
