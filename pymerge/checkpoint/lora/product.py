"""``x + scale * left @ right``, a range of it at a time, to the same bits whatever the ranges and threads.

A matrix product of a library may split and order its sums by the shape, the number of threads and the processor. Here every element is
one fixed sequence of IEEE operations: the products over the rank, each rounded, added in the order of the rank, each sum rounded; times
the scale; plus x; rounded once to x's dtype. All in fp32, or in fp64 when x or a factor is fp64. No fused multiply-add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops

__all__ = ["add_product", "product"]

NATIVE = (torch.float32, torch.bfloat16, torch.float16)
"""Types of x that the C++ core adds to; for the others (fp64, fp8) and without it the same operations are done by torch."""

BLOCK = 2**17
"""Elements worked on at a time: two fp32 buffers of that size nearly stay in a core's second-level cache."""


def add_product(x: Tensor, first: int, left: Tensor, right: Tensor, scale: float) -> None:
    """Add a range of ``scale * left @ right`` to `x`, in place.

    Args:
        x: 1-D, any floating dtype: elements `first`, `first` + 1, ... of a row-major matrix of the product's shape.
        left: (rows, rank); right: (rank, columns); both fp32 or both fp64, contiguous.
    """
    if left.dtype == torch.float32 and x.dtype in NATIVE and len(x) and ops.backend_name(x.device) == "native":
        from ...native import add_low_rank

        add_low_rank(x, first, left, right, scale)
        return
    columns = right.shape[1]
    done = 0
    while done < len(x):
        row, inside = divmod(first + done, columns)
        if inside or len(x) - done < columns:  # part of a row
            count = min(columns - inside, len(x) - done)
            block = _product(left[row : row + 1], right[:, inside : inside + count], scale)
        else:
            rows = min(max(1, BLOCK // columns), (len(x) - done) // columns)
            count = rows * columns
            block = _product(left[row : row + rows], right, scale)
        piece = x[done : done + count]
        piece.copy_(block.view(-1).add_(piece.to(block.dtype)))
        done += count


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The whole of ``scale * left @ right``, by the same operations."""
    out = torch.zeros(left.shape[0] * right.shape[1], dtype=left.dtype)
    if out.numel():
        add_product(out, 0, left, right, scale)
    return out.view(left.shape[0], right.shape[1])


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    total = left[:, :1] * right[0]
    term = torch.empty_like(total)
    for k in range(1, left.shape[1]):
        total.add_(torch.mul(left[:, k : k + 1], right[k], out=term))
    return total.mul_(scale)
