"""Interpolation between pairs of tensors, and the search for infinities in tensors, one launch per kind of dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Table, block_of, launch
from .memory import load_wide, scalar, store_rounded
from .sparsify import infinity_key, key_type, magnitude_key

__all__ = ["finite_kernel", "lerp", "lerp_kernel", "look_for_infinities"]


@triton.jit
def _lerp_block(
    row, first, n, largest, weight, A: tl.constexpr, B: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr, NEAR_A: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    a = load_wide(tl.load(row + 1), first, lane, n, A, COMPUTE, ALIGNED, MASKED)
    b = load_wide(tl.load(row + 2), first, lane, n, B, COMPUTE, ALIGNED, MASKED)
    difference = b - a
    step = difference * weight
    result = a + step if NEAR_A else b - step
    store_rounded(result, tl.load(row + 3), first, lane, n, OUT, ALIGNED, MASKED)
    return tl.maximum(largest, magnitude_key(difference))


@triton.jit(do_not_specialize=["chunks_at"])
def lerp_kernel(
    table,  # int64, see launch.py; rows of size, addresses of a, b and the result, and the weight
    chunks_at,
    A: tl.constexpr, B: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr, NEAR_A: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """result = a + weight * (b - a), or b - weight * (b - a) with NEAR_A off; the result may be a itself."""
    entry = table + chunks_at + 2 * tl.program_id(0).to(tl.int64)
    row = table + tl.load(entry)
    start = tl.multiple_of(tl.load(entry + 1), BLOCK)
    n = tl.load(row)
    weight = scalar(tl.load(row + 4), COMPUTE)
    largest = tl.zeros([BLOCK], key_type(COMPUTE))
    for step in range(0, CHUNK, BLOCK):
        first = start + step
        if first + BLOCK <= n:
            largest = _lerp_block(row, first, n, largest, weight, A, B, OUT, COMPUTE, NEAR_A, ALIGNED, False, BLOCK)
        elif first < n:
            largest = _lerp_block(row, first, n, largest, weight, A, B, OUT, COMPUTE, NEAR_A, ALIGNED, True, BLOCK)
    if tl.max(largest, 0) >= infinity_key(COMPUTE):
        tl.store(table, 1)  # every program that stores, stores the same


def lerp(table: Table, near_a: bool) -> None:
    """Launch the kernel for all pairs of a table. A group's key is (a, b, result and compute dtype, aligned), Triton's dtypes."""
    for group in table.groups:
        a, b, out, compute, is_aligned = group.key
        launch(
            lerp_kernel, group.chunks, table.words.device, table.words, group.chunks_at,
            A=a, B=b, OUT=out, COMPUTE=compute, NEAR_A=near_a, ALIGNED=is_aligned, CHUNK=table.chunk, BLOCK=block_of(compute),
        )  # fmt: skip


@triton.jit(do_not_specialize=["chunks_at"])
def finite_kernel(
    table,  # int64, see launch.py; rows of size and address
    chunks_at,
    DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sets the table's flag when an element is not finite."""
    entry = table + chunks_at + 2 * tl.program_id(0).to(tl.int64)
    row = table + tl.load(entry)
    start = tl.multiple_of(tl.load(entry + 1), BLOCK)
    n = tl.load(row)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], key_type(COMPUTE))
    for step in range(0, CHUNK, BLOCK):
        first = start + step
        if first + BLOCK <= n:
            largest = tl.maximum(largest, magnitude_key(load_wide(tl.load(row + 1), first, lane, n, DTYPE, COMPUTE, ALIGNED, False)))
        elif first < n:
            largest = tl.maximum(largest, magnitude_key(load_wide(tl.load(row + 1), first, lane, n, DTYPE, COMPUTE, ALIGNED, True)))
    if tl.max(largest, 0) >= infinity_key(COMPUTE):
        tl.store(table, 1)


def look_for_infinities(table: Table) -> None:
    """Launch the kernel for all tensors of a table. A group's key is (dtype, aligned), Triton's dtypes."""
    for group in table.groups:
        dtype, is_aligned = group.key
        compute = tl.float64 if dtype == tl.float64 else tl.float32
        launch(
            finite_kernel, group.chunks, table.words.device, table.words, group.chunks_at,
            DTYPE=dtype, COMPUTE=compute, ALIGNED=is_aligned, CHUNK=table.chunk, BLOCK=block_of(compute),
        )  # fmt: skip
