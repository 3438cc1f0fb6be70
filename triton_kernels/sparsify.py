"""Which elements of a delta are kept."""

import triton
import triton.language as tl

from .philox import draws
from .rows import KEY_WORD, LARGER_WORD

__all__ = ["infinity_key", "key_type", "kept_by_chance", "kept_by_selection", "magnitude_key"]


@triton.constexpr_function
def key_type(compute):
    """The integer of the compute dtype's width."""
    return tl.int64 if compute == tl.float64 else tl.int32


@triton.constexpr_function
def infinity_key(compute):
    """The key of an infinity: what is not below it is not finite."""
    return 0x7FF0000000000000 if compute == tl.float64 else 0x7F800000


@triton.jit
def magnitude_key(delta):
    """The bits of |delta| as an integer, which has the same order."""
    if delta.dtype == tl.float64:
        return delta.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def kept_by_magnitude(key, threshold, cut, first, lane):
    """Whether key > threshold, or equal with first + lane <= cut."""
    # The cut as a lane, so that lanes are compared in 32 bits; a block has far fewer than 2**30 lanes.
    last = tl.minimum(tl.maximum(cut - first, -1), 1 << 30).to(tl.int32)
    threshold = threshold.to(key.dtype)
    return (key > threshold) | ((key == threshold) & (lane <= last))


@triton.jit
def kept_by_selection(key, words, first, lane, BAND: tl.constexpr):
    """Whether the selection at a model's `words` (rows.py) keeps first + lane; for a band also whether the other one does not."""
    kept = kept_by_magnitude(key, tl.load(words + KEY_WORD), tl.load(words + KEY_WORD + 1), first, lane)
    if BAND:
        kept = kept & ~kept_by_magnitude(key, tl.load(words + LARGER_WORD), tl.load(words + LARGER_WORD + 1), first, lane)
    return kept


@triton.jit
def kept_by_chance(group, seed, tensor, model, keep_below, SHAPE: tl.constexpr):
    """Whether the draw is below `keep_below`, a number in [0, 2**32]."""
    # 2**32 has 33 bits: compare with the largest draw that is kept, in 32.
    last = tl.maximum(keep_below - 1, 0).to(tl.uint32)
    # A whole block of keep_below: the interpreter spreads a scalar comparison as numbers, not as booleans.
    return (draws(group, seed, tensor, model, SHAPE) <= last) & (tl.full(SHAPE, keep_below, tl.int64) > 0)
