"""The kernels of the exact k-th magnitude that read the data. `threshold.py` says how they are used, `rank.py` has the others.

All work on the table of a merge (rows.py). Programs come with the models varying fastest, so that the base is read from memory once.
"""

import triton
import triton.language as tl

from .memory import load_wide, widen
from .rank import (
    ABOVE,
    CHUNKS,
    COUNTERS,
    EQUAL,
    FIRST_CHUNK,
    FOUND,
    HI,
    LO,
    MID,
    MODE,
    MODE_MID,
    MODE_SLOW,
    OVER,
    SEGMENT,
    SETTLED,
    SETTLED_WORDS,
    SLOT,
    SLOTS,
    TIE_RANK,
    WORDS,
    K,
    add_digits,
    advance,
)  # fmt: skip
from .rows import BASE_WORD, FIRST_CHUNK_WORD, OFFSET_WORD, ROW_HEADER, ROW_MODEL, SELECTION_WORD
from .sparsify import key_type, magnitude_key

__all__ = ["bracket_kernel", "cut_kernel", "digits_kernel", "sample_kernel", "tally_kernel"]

UNIT_WORDS = tl.constexpr(6)


@triton.jit
def _keys(row, m, first, lane, n, HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr,
          ALIGNED: tl.constexpr):  # fmt: skip
    """Keys of elements first + lane, -1 from n on."""
    address = tl.load(row + ROW_HEADER + ROW_MODEL * m)
    if first + lane.shape[0] <= n:
        delta = load_wide(address, first, lane, n, MODEL, COMPUTE, ALIGNED, False)
        if HAS_BASE:
            delta = delta - load_wide(tl.load(row + BASE_WORD), first, lane, n, BASE, COMPUTE, ALIGNED, False)
        key = magnitude_key(delta)
    else:
        delta = load_wide(address, first, lane, n, MODEL, COMPUTE, ALIGNED, True)
        if HAS_BASE:
            delta = delta - load_wide(tl.load(row + BASE_WORD), first, lane, n, BASE, COMPUTE, ALIGNED, True)
        key = tl.where(lane < n - first, magnitude_key(delta), -1)
    return key


@triton.jit
def _jitter(run, span):
    """A number in [0, span) that looks random, the same each time."""
    x = run.to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 15)) * 0x85EBCA77
    x = x ^ (x >> 13)
    return ((x.to(tl.uint64) * span.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit(do_not_specialize=["first_unit"])
def sample_kernel(
    table,
    units,  # int64 [units, 6]: place of the tensor's row, first run, runs, where run 0's keys of model 0 go, keys per model, stride
    first_unit,
    out,  # the keys' integer type; -1 where a run leaves its tensor
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, MODELS: tl.constexpr,
    RUN: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Keys of runs of neighbouring elements: one run somewhere in every `stride` elements, at most TOGETHER a program."""
    m = tl.program_id(0) % MODELS
    unit = units + (first_unit + tl.program_id(0) // MODELS).to(tl.int64) * UNIT_WORDS
    row = table + tl.load(unit)
    stride = tl.load(unit + 5)
    n = tl.load(row)
    lane = tl.arange(0, TOGETHER)
    mine = lane < tl.load(unit + 2)
    run = tl.load(unit + 1) + lane
    first = run * stride - tl.load(row + OFFSET_WORD) + _jitter(run, tl.maximum(stride - RUN + 1, 1))
    first = tl.maximum(tl.minimum(first, n - RUN), 0)
    index = first[:, None] + tl.arange(0, RUN)[None, :]
    inside = mine[:, None] & (index < n)
    address = tl.load(row + ROW_HEADER + ROW_MODEL * m).to(tl.pointer_type(MODEL))
    delta = widen(tl.load(address + index, mask=inside, other=0.0), COMPUTE)
    if HAS_BASE:
        address = tl.load(row + BASE_WORD).to(tl.pointer_type(BASE))
        delta = delta - widen(tl.load(address + index, mask=inside, other=0.0), COMPUTE)
    to = tl.load(unit + 3) + m * tl.load(unit + 4) + run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(out + to, tl.where(inside, magnitude_key(delta), -1), mask=mine[:, None])


@triton.jit(do_not_specialize=["chunks_at", "chunks"])
def bracket_kernel(
    table, chunks_at, chunks,  # of all launches
    rows,  # int64, rank.py's constants per row
    settled,  # int64, rank.py's findings per row
    counters,  # int64 [rows, COUNTERS], added to
    equal_mid,  # int32 [MODELS, chunks]: keys equal to mid
    filled,  # int32 [slots, 32], of which the first counts: the others keep a counter alone on its cache line
    found_keys, found_chunk,  # other keys in [lo, hi], in any order, and their chunks
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, MODELS: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass that counts against a bracket and collects what lies inside."""
    m = tl.program_id(0) % MODELS
    entry = table + chunks_at + 2 * (tl.program_id(0) // MODELS).to(tl.int64)
    row = table + tl.load(entry)
    start = tl.multiple_of(tl.load(entry + 1), BLOCK)
    r = tl.load(row + SELECTION_WORD) + m
    rows += r * WORDS
    if tl.load(rows + K) > 0:
        n = tl.load(row)
        chunk = tl.load(row + FIRST_CHUNK_WORD) + start // CHUNK
        lane = tl.arange(0, BLOCK)
        above = tl.zeros([BLOCK], tl.int32)
        over = tl.zeros([BLOCK], tl.int32)
        equal = tl.zeros([BLOCK], tl.int32)
        KEY: tl.constexpr = key_type(COMPUTE)
        lo = tl.load(settled + r * SETTLED_WORDS + LO).to(KEY)
        mid = tl.load(settled + r * SETTLED_WORDS + MID).to(KEY)
        hi = tl.load(settled + r * SETTLED_WORDS + HI).to(KEY)
        # Chunks share a few counters and segments, so that a crowded chunk finds room that others left.
        slot = tl.load(rows + SLOT) + (chunk - tl.load(rows + FIRST_CHUNK)) % tl.load(rows + SLOTS)
        segment = tl.load(rows + SEGMENT)
        to = tl.load(rows + SEGMENT + 1) + (slot - tl.load(rows + SLOT)) * segment
        for step in range(0, CHUNK, BLOCK):
            first = start + step
            if first < n:
                key = _keys(row, m, first, lane, n, HAS_BASE, BASE, MODEL, COMPUTE, ALIGNED)
                above += (key > hi).to(tl.int32)
                over += (key > mid).to(tl.int32)
                equal += (key == mid).to(tl.int32)
                inside = (key >= lo) & (key <= hi) & (key != mid)
                at = tl.atomic_add(filled + slot * 32 + tl.zeros([BLOCK], tl.int32), 1, mask=inside, sem="relaxed")
                fits = inside & (at < segment)
                tl.store(found_keys + to + at, key, mask=fits)
                tl.store(found_chunk + to + at, (chunk + lane * 0).to(tl.int32), mask=fits)
        same = tl.sum(equal)
        counters += r * COUNTERS
        tl.atomic_add(counters + ABOVE, tl.sum(above).to(tl.int64), sem="relaxed")
        tl.atomic_add(counters + OVER, tl.sum(over).to(tl.int64), sem="relaxed")
        tl.atomic_add(counters + EQUAL, same.to(tl.int64), sem="relaxed")
        tl.store(equal_mid + m.to(tl.int64) * chunks + chunk, same)


@triton.jit(do_not_specialize=["chunks_at", "group_chunks", "digit"])
def digits_kernel(
    table, chunks_at,
    group_chunks,  # of this launch
    any_slow,  # int64 [1]: whether there is anything to do
    settled,
    states, histograms,  # as radix_kernel has them
    digit,
    BITS: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, MODELS: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """radix_kernel's pass over the data themselves, for rows whose bracket was of no use; a fixed number of programs."""
    if tl.load(any_slow) > 0:
        lane = tl.arange(0, BLOCK)
        for item in range(tl.program_id(0), group_chunks * MODELS, tl.num_programs(0)):
            work = tl.zeros([], tl.int64) + item  # the interpreter counts in Python's integers
            m = work % MODELS
            entry = table + chunks_at + 2 * (work // MODELS)
            row = table + tl.load(entry)
            start = tl.multiple_of(tl.load(entry + 1), BLOCK)
            r = tl.load(row + SELECTION_WORD) + m
            if tl.load(settled + r * SETTLED_WORDS + MODE) == MODE_SLOW:
                n = tl.load(row)
                prefix, _ = advance(states, histograms, r, digit, BITS)
                counts = tl.zeros([256], tl.int32)
                for step in range(0, CHUNK, BLOCK):
                    first = start + step
                    if first < n:
                        key = _keys(row, m, first, lane, n, HAS_BASE, BASE, MODEL, COMPUTE, ALIGNED)
                        counts = add_digits(counts, key, prefix, digit, BITS)
                to = histograms + (r * ((BITS + 7) // 8) + digit) * 256 + tl.arange(0, 256)
                tl.atomic_add(to, counts.to(histograms.dtype.element_ty), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["chunks_at", "group_chunks", "chunks"])
def tally_kernel(
    table, chunks_at, group_chunks, any_slow, settled,
    equal,  # int32 [MODELS, chunks]: keys equal to the row's k-th
    chunks,
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, MODELS: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts ties per chunk for the rows of digits_kernel."""
    if tl.load(any_slow) > 0:
        lane = tl.arange(0, BLOCK)
        for item in range(tl.program_id(0), group_chunks * MODELS, tl.num_programs(0)):
            work = tl.zeros([], tl.int64) + item  # the interpreter counts in Python's integers
            m = work % MODELS
            entry = table + chunks_at + 2 * (work // MODELS)
            row = table + tl.load(entry)
            start = tl.multiple_of(tl.load(entry + 1), BLOCK)
            r = tl.load(row + SELECTION_WORD) + m
            if tl.load(settled + r * SETTLED_WORDS + MODE) == MODE_SLOW:
                n = tl.load(row)
                found = tl.load(settled + r * SETTLED_WORDS + FOUND).to(key_type(COMPUTE))
                ties = tl.zeros([BLOCK], tl.int32)
                for step in range(0, CHUNK, BLOCK):
                    first = start + step
                    if first < n:
                        ties += (_keys(row, m, first, lane, n, HAS_BASE, BASE, MODEL, COMPUTE, ALIGNED) == found).to(tl.int32)
                chunk = tl.load(row + FIRST_CHUNK_WORD) + start // CHUNK
                tl.store(equal + m * chunks + chunk, tl.sum(ties))


@triton.jit(do_not_specialize=["entries_at", "chunks_at", "group_chunks", "chunks"])
def cut_kernel(
    table, entries_at, chunks_at, group_chunks, chunks, rows, settled,
    equal_mid, equal,  # int32 [MODELS, chunks]: ties per chunk, when the k-th key was mid and otherwise
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, MODELS: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Flat index of the last tie that is kept, a program per row: counts lead to its chunk, and only that is looked at again.

    The launch of the group that has the chunk finds the element; the others leave the row alone.
    """
    r = tl.program_id(0).to(tl.int64)
    m = r % MODELS
    rows += r * WORDS
    settled += r * SETTLED_WORDS
    mode = tl.load(settled + MODE)
    if mode != SETTLED:
        if mode == MODE_MID:
            equal = equal_mid
        equal += m * chunks + tl.load(rows + FIRST_CHUNK)
        count = tl.load(rows + CHUNKS)
        rank = tl.load(settled + TIE_RANK)
        place = tl.zeros([], tl.int64)
        walk = tl.arange(0, WALK)
        first = tl.zeros([], tl.int64)
        missing = rank  # ties that are still to be found
        while (first < count) & (missing > 0):
            ties = tl.load(equal + first + walk, mask=first + walk < count, other=0).to(tl.int64)
            here = tl.sum(ties)
            if here < missing:
                missing -= here
                first += WALK
            else:
                before = tl.cumsum(ties, 0) - ties
                hit = (before < missing) & (missing <= before + ties)
                place = first + tl.sum(tl.where(hit, walk, 0))
                rank = missing - tl.sum(tl.where(hit, before, 0))
                missing = missing * 0
        entry_at = tl.load(table + entries_at + tl.load(rows + FIRST_CHUNK) + place)
        if (entry_at >= chunks_at) & (entry_at < chunks_at + 2 * group_chunks):
            row = table + tl.load(table + entry_at)
            start = tl.multiple_of(tl.load(table + entry_at + 1), BLOCK)
            n = tl.load(row)
            found = tl.load(settled + FOUND).to(key_type(COMPUTE))
            offset = tl.load(row + OFFSET_WORD)
            lane = tl.arange(0, BLOCK)
            for step in range(0, CHUNK, BLOCK):
                first = start + step
                if first < n:
                    tie = (_keys(row, m, first, lane, n, HAS_BASE, BASE, MODEL, COMPUTE, ALIGNED) == found).to(tl.int32)
                    order = tl.cumsum(tie, 0)
                    last = tl.sum(tl.where((tie > 0) & (order == rank), lane + 1, 0))
                    if last > 0:
                        tl.store(settled + FOUND + 1, offset + first + last - 1)
                    rank -= tl.sum(tie)
