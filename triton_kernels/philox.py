"""The random draws: Philox4x32-10, as docs/arithmetic.md defines them."""

import triton
import triton.language as tl

__all__ = ["draws"]


@triton.jit
def draws(group, seed, tensor, model, SHAPE: tl.constexpr):
    """The draws (uint32) of elements 4 * group .. 4 * group + 3, side by side in the last dimension; SHAPE is the result's shape.

    Args:
        group: int64, flat index >> 2.
        seed: 64 bits, the key.
        tensor, model: the upper words of the counter.
    """
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed.to(tl.uint64), low, high, zero + tensor.to(tl.uint32), zero + model.to(tl.uint32))
    # join puts two values next to each other: (a, b, c, d) per counter, without going through shared memory.
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), SHAPE)
