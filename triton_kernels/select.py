"""The kernels of the exact k-th magnitude. `threshold.py` says how they are used.

All work on chunks (launch.py) of rows: size, flat index of the first element, address of the base, address of each model. Programs come
with the models varying fastest, so that the base is read from memory once.
"""

import triton
import triton.language as tl

from .memory import load_wide, widen
from .sparsify import magnitude_key

__all__ = ["bracket_kernel", "keys_kernel", "pivots_kernel", "sample_kernel"]

ROW_HEADER = tl.constexpr(3)


@triton.jit
def _keys(row, m, first, lane, n, HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr,
          ALIGNED: tl.constexpr):  # fmt: skip
    """Keys of elements first + lane, -1 from n on."""
    if first + lane.shape[0] <= n:
        delta = load_wide(tl.load(row + ROW_HEADER + m), first, lane, n, MODEL, COMPUTE, ALIGNED, False)
        if HAS_BASE:
            delta = delta - load_wide(tl.load(row + 2), first, lane, n, BASE, COMPUTE, ALIGNED, False)
        key = magnitude_key(delta)
    else:
        delta = load_wide(tl.load(row + ROW_HEADER + m), first, lane, n, MODEL, COMPUTE, ALIGNED, True)
        if HAS_BASE:
            delta = delta - load_wide(tl.load(row + 2), first, lane, n, BASE, COMPUTE, ALIGNED, True)
        key = tl.where(lane < n - first, magnitude_key(delta), -1)
    return key


@triton.jit(do_not_specialize=["chunks_at", "model", "origin"])
def keys_kernel(
    table, chunks_at, model, origin: tl.int64,
    out,  # the keys' integer type; element e's key goes to out[e - origin], e its flat index
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the keys of one model."""
    entry = table + chunks_at + 2 * tl.program_id(0).to(tl.int64)
    row = table + tl.load(entry)
    start = tl.multiple_of(tl.load(entry + 1), BLOCK)
    n = tl.load(row)
    to = out + (tl.load(row + 1) - origin)
    lane = tl.arange(0, BLOCK)
    for step in range(0, CHUNK, BLOCK):
        first = start + step
        if first < n:
            key = _keys(row, model, first, lane, n, HAS_BASE, BASE, MODEL, COMPUTE, ALIGNED)
            tl.store(to + first + lane, key, mask=lane < n - first)


@triton.jit
def sample_kernel(
    table,
    runs,  # int64 [runs, 2]: place of the row in the table, first element
    out,  # [MODELS, runs * RUN] of the keys' integer type; -1 where a run leaves its tensor
    count,  # of runs
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, MODELS: tl.constexpr,
    RUN: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Keys of runs of neighbouring elements, TOGETHER runs a program."""
    m = tl.program_id(0) % MODELS
    run = tl.program_id(0) // MODELS * TOGETHER + tl.arange(0, TOGETHER)
    row = table + tl.load(runs + 2 * run, mask=run < count, other=0)
    n = tl.load(row, mask=run < count, other=0)
    index = tl.load(runs + 2 * run + 1, mask=run < count, other=0)[:, None] + tl.arange(0, RUN)[None, :]
    inside = index < n[:, None]
    address = tl.load(row + ROW_HEADER + m, mask=run < count, other=0)[:, None]
    delta = widen(tl.load(address.to(tl.pointer_type(MODEL)) + index, mask=inside, other=0.0), COMPUTE)
    if HAS_BASE:
        address = tl.load(row + 2, mask=run < count, other=0)[:, None]
        delta = delta - widen(tl.load(address.to(tl.pointer_type(BASE)) + index, mask=inside, other=0.0), COMPUTE)
    to = m.to(tl.int64) * count * RUN + run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(out + to, tl.where(inside, magnitude_key(delta), -1), mask=(run < count)[:, None])


@triton.jit(do_not_specialize=["chunks_at", "chunks_before", "chunks", "slots", "segment"])
def bracket_kernel(
    table, chunks_at,
    chunks_before,  # of other launches for the same counters
    chunks,  # of all launches
    brackets,  # int64 [MODELS, 3]: lo, mid, hi
    counts,  # int64 [MODELS, 2, chunks]: keys above hi, keys equal to mid
    filled,  # int32 [MODELS, slots, 32], of which the first counts: the others keep a counter alone on its cache line
    found_keys, found_index,  # [MODELS, slots, segment]: other keys in [lo, hi], in any order, and their flat indices
    slots, segment,
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, MODELS: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass that counts against a bracket and collects what lies inside."""
    m = tl.program_id(0) % MODELS
    c = tl.program_id(0) // MODELS
    entry = table + chunks_at + 2 * c.to(tl.int64)
    row = table + tl.load(entry)
    start = tl.multiple_of(tl.load(entry + 1), BLOCK)
    n = tl.load(row)
    offset = tl.load(row + 1)
    lane = tl.arange(0, BLOCK)
    above = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    lo = tl.load(brackets + 3 * m)
    mid = tl.load(brackets + 3 * m + 1)
    hi = tl.load(brackets + 3 * m + 2)
    if COMPUTE == tl.float32:
        lo, mid, hi = lo.to(tl.int32), mid.to(tl.int32), hi.to(tl.int32)
    # Chunks share a few counters and segments, so that a crowded chunk finds room that others left.
    slot = (m * slots + (chunks_before + c) % slots).to(tl.int64)
    for step in range(0, CHUNK, BLOCK):
        first = start + step
        if first < n:
            key = _keys(row, m, first, lane, n, HAS_BASE, BASE, MODEL, COMPUTE, ALIGNED)
            above += (key > hi).to(tl.int32)
            equal += (key == mid).to(tl.int32)
            inside = (key >= lo) & (key <= hi) & (key != mid)
            at = tl.atomic_add(filled + slot * 32 + tl.zeros([BLOCK], tl.int32), 1, mask=inside, sem="relaxed")
            fits = inside & (at < segment)
            tl.store(found_keys + slot * segment + at, key, mask=fits)
            tl.store(found_index + slot * segment + at, offset + first + lane, mask=fits)
    to = counts + 2 * m.to(tl.int64) * chunks + chunks_before + c
    tl.store(to, tl.sum(above).to(tl.int64))
    tl.store(to + chunks, tl.sum(equal).to(tl.int64))


@triton.jit(do_not_specialize=["chunks_at"])
def pivots_kernel(
    table, chunks_at,
    pivots,  # int64 [MODELS, PIVOTS]
    counts,  # int64 [MODELS, PIVOTS], added to: keys that are not below the pivot
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, MODELS: tl.constexpr,
    PIVOTS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts against many pivots. Integers, so that the order of the additions does not matter."""
    m = tl.program_id(0) % MODELS
    entry = table + chunks_at + 2 * (tl.program_id(0) // MODELS).to(tl.int64)
    row = table + tl.load(entry)
    start = tl.multiple_of(tl.load(entry + 1), BLOCK)
    n = tl.load(row)
    lane = tl.arange(0, BLOCK)
    for step in range(0, CHUNK, BLOCK):
        first = start + step
        if first < n:
            key = _keys(row, m, first, lane, n, HAS_BASE, BASE, MODEL, COMPUTE, ALIGNED).to(tl.int64)
            for p in range(PIVOTS):
                reached = tl.sum((key >= tl.load(pivots + PIVOTS * m + p)).to(tl.int32))
                tl.atomic_add(counts + PIVOTS * m + p, reached.to(tl.int64), sem="relaxed")
