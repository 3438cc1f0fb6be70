"""Loads that widen and stores that round, by addresses from a table."""

import triton
import triton.language as tl

from .compat import INTERPRET

__all__ = ["load_wide", "round_to", "scalar", "store_rounded", "widen"]


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """`x` in the compute dtype, which is exact."""
    if INTERPRET and x.dtype == tl.bfloat16:
        # The interpreter holds bf16 as integers, and its own conversion gets subnormals wrong.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        return x.to(COMPUTE)


@triton.jit
def load_wide(address, first, lane, n, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Elements first + lane in the compute dtype, zero from n on when MASKED.

    ALIGNED promises an address that is a multiple of 16 and a `first` that keeps it one, which makes the loads 128 bits wide.
    """
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        x = tl.load(pointer + first + lane, mask=lane < n - first, other=0.0)
    else:
        x = tl.load(pointer + first + lane)
    return widen(x, COMPUTE)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """`x` rounded once to nearest even."""
    HALF: tl.constexpr = DTYPE == tl.float16 or DTYPE == tl.bfloat16
    if HALF and x.dtype == tl.float64:
        # By way of fp32, to odd, which makes the second rounding exact (Boldo and Melquiond 2005).
        single = x.to(tl.float32)
        back = single.to(tl.float64)
        bits = single.to(tl.int32, bitcast=True)
        bits = tl.where(tl.abs(back) > tl.abs(x), bits - 1, bits)
        bits = tl.where((back != x) & (x == x), bits | 1, bits)
        x = bits.to(tl.float32, bitcast=True)
    if INTERPRET and DTYPE == tl.bfloat16:
        # The interpreter truncates where the hardware rounds.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def store_rounded(x, address, first, lane, n, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Counterpart of load_wide."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        tl.store(pointer + first + lane, round_to(x, DTYPE), mask=lane < n - first)
    else:
        tl.store(pointer + first + lane, round_to(x, DTYPE))


@triton.jit
def scalar(word, COMPUTE: tl.constexpr):
    """A number in the compute dtype from the table word that holds its bits."""
    if COMPUTE == tl.float64:
        return word.to(tl.float64, bitcast=True)
    else:
        return word.to(tl.int32).to(tl.float32, bitcast=True)
