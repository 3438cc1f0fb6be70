"""The kernels of the exact k-th magnitude that read collected keys and what is known of each row, in device memory throughout.

A row is one model of what is ranked together. The k-th key is found by its digits of 8 bits, from the highest: a pass counts the digit's
values among the keys that begin as the k-th does. Programs of a pass work the digit before out of the last pass's counts, each for itself
and all alike, so that nobody waits for anybody.
"""

import triton
import triton.language as tl

from .rows import OFFSET_WORD, ROW_HEADER, ROW_MODEL, SELECTION_WORD

__all__ = ["bracket_ends_kernel", "publish_kernel", "radix_kernel", "settle_kernel", "tally_found_kernel", "where_to_look_kernel"]

# What the host says of a row: rank k (0: the answer is known), elements, first slot, slots, their keys each and where they start, index
# among the rows with a sample or -1, first chunk, chunks, and the answer (key, cut) where it is known.
K, N, SLOT, SLOTS, SEGMENT = (tl.constexpr(i) for i in range(5))
SAMPLED, FIRST_CHUNK, CHUNKS, ANSWER = (tl.constexpr(i) for i in range(6, 10))
WORDS = tl.constexpr(11)

# What is found out: the bracket, where the k-th key is to be looked for, the key, the cut, and how many ties of it are kept.
LO, MID, HI, MODE, FOUND, CUT, TIE_RANK = (tl.constexpr(i) for i in range(7))
SETTLED_WORDS = tl.constexpr(8)
SETTLED = tl.constexpr(0)  # nothing to look for
MODE_MID = tl.constexpr(1)  # the bracket's middle is the key
MODE_COLLECTED = tl.constexpr(2)  # it is among the collected keys
MODE_SLOW = tl.constexpr(3)  # the bracket missed, or held too much

# What the bracket pass adds up: keys above the bracket, above its middle, equal to its middle.
ABOVE, OVER, EQUAL = (tl.constexpr(i) for i in range(3))
COUNTERS = tl.constexpr(4)


@triton.jit
def _shift_before(digit, BITS: tl.constexpr):
    """How many bits are below the digits before `digit`; the last digit has what is left, 7 bits."""
    return tl.maximum(BITS - 8 * digit, 0)


@triton.jit
def advance(states, histograms, job, digit, BITS: tl.constexpr):
    """(first digits of the k-th key, its rank among the keys that have them) before `digit`; rank 0: there is nothing to do.

    states: int64 [jobs, digits + 1, 2]; histograms: [jobs, digits, 256]. The first state is given; the others are stored here.
    """
    DIGITS: tl.constexpr = (BITS + 7) // 8
    state = states + (job * (DIGITS + 1) + digit) * 2
    if digit == 0:
        prefix = tl.load(state)
        rank = tl.load(state + 1)
    else:
        prefix = tl.load(state - 2)
        rank = tl.load(state - 1)
        if rank > 0:
            value = tl.arange(0, 256)
            counts = tl.load(histograms + (job * DIGITS + digit - 1) * 256 + value).to(tl.int64)
            above = tl.sum(counts) - tl.cumsum(counts, 0)
            hit = (above < rank) & (rank <= above + counts)
            width = _shift_before(digit - 1, BITS) - _shift_before(digit, BITS)
            prefix = (prefix << width) | tl.sum(tl.where(hit, value, 0)).to(tl.int64)
            rank = rank - tl.sum(tl.where(hit, above, 0))
        tl.store(state, prefix)
        tl.store(state + 1, rank)
    return prefix, rank


@triton.jit
def add_digits(counts, key, prefix, digit, BITS: tl.constexpr):
    """Adds to counts [256] the digits of the keys that begin with prefix. Keys of -1 begin with nothing."""
    before = _shift_before(digit, BITS)
    shift = _shift_before(digit + 1, BITS)
    value = ((key >> shift.to(key.dtype)) & ((1 << (before - shift)) - 1).to(key.dtype)).to(tl.int32)
    # Before the first digit there is the sign, which only -1 has.
    return counts + tl.histogram(value, 256, mask=(key >> before.to(key.dtype)) == prefix.to(key.dtype))


@triton.jit(do_not_specialize=["digit"])
def radix_kernel(
    pieces,  # int64 [pieces, 3]: row, where the keys start, how many
    filled,  # int32 [pieces, 32]: how many there are indeed, when FILLED
    settled,  # then only rows whose key is among them count
    keys,
    states, histograms,  # of STATISTICS jobs per row, see advance
    digit,
    BITS: tl.constexpr, STATISTICS: tl.constexpr, FILLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts one digit over a piece of collected keys, for each of a row's order statistics."""
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(pieces + 3 * piece)
    keys += tl.load(pieces + 3 * piece + 1)
    count = tl.load(pieces + 3 * piece + 2)
    if FILLED:
        looks = tl.load(settled + row * SETTLED_WORDS + MODE) == MODE_COLLECTED
        count = tl.where(looks, tl.minimum(count, tl.load(filled + 32 * piece)), 0)
    lane = tl.arange(0, BLOCK)
    for s in range(STATISTICS):
        job = row * STATISTICS + s
        prefix, rank = advance(states, histograms, job, digit, BITS)
        if (rank > 0) & (count > 0):
            counts = tl.zeros([256], tl.int32)
            for first in range(0, count, BLOCK):
                key = tl.load(keys + first + lane, mask=first + lane < count, other=-1)
                counts = add_digits(counts, key, prefix, digit, BITS)
            to = histograms + (job * ((BITS + 7) // 8) + digit) * 256 + tl.arange(0, 256)
            tl.atomic_add(to, counts.to(histograms.dtype.element_ty), mask=counts > 0, sem="relaxed")


@triton.jit
def bracket_ends_kernel(rows, settled, states, histograms, BITS: tl.constexpr, SAMPLES: tl.constexpr):
    """Per row the bracket: the sample's three order statistics; everything, where there is no sample or it does not reach."""
    r = tl.program_id(0).to(tl.int64)
    settled += r * SETTLED_WORDS
    largest = tl.full([], (1 << BITS) - 1, tl.int64)
    lo = tl.zeros([], tl.int64)
    mid = largest
    hi = largest
    if SAMPLES:
        sampled = tl.load(rows + r * WORDS + SAMPLED)
        if sampled >= 0:
            DIGITS: tl.constexpr = (BITS + 7) // 8
            key, rank = advance(states, histograms, 3 * sampled, DIGITS, BITS)
            lo = tl.where(rank > 0, key, lo)
            mid, rank = advance(states, histograms, 3 * sampled + 1, DIGITS, BITS)
            key, rank = advance(states, histograms, 3 * sampled + 2, DIGITS, BITS)
            hi = tl.where(rank > 0, key, hi)
    tl.store(settled + LO, lo)
    tl.store(settled + MID, mid)
    tl.store(settled + HI, hi)


@triton.jit
def where_to_look_kernel(
    rows, settled, counters, filled,
    states,  # int64 [rows, digits + 1, 2]
    any_slow,  # int64 [1]
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row, what the counts prove: the k-th key is the bracket's middle, or the so-many-th of the collected ones, or neither."""
    r = tl.program_id(0).to(tl.int64)
    rows += r * WORDS
    settled += r * SETTLED_WORDS
    counters += r * COUNTERS
    k = tl.load(rows + K)
    rank = tl.zeros([], tl.int64)
    if k == 0:
        tl.store(settled + MODE, SETTLED)
        tl.store(settled + FOUND, tl.load(rows + ANSWER))
        tl.store(settled + CUT, tl.load(rows + ANSWER + 1))
    else:
        above = tl.load(counters + ABOVE)
        over = tl.load(counters + OVER)
        equal = tl.load(counters + EQUAL)
        if (over < k) & (k <= over + equal):
            tl.store(settled + MODE, MODE_MID)
            tl.store(settled + FOUND, tl.load(settled + MID))
            tl.store(settled + TIE_RANK, k - over)
        else:
            slots = tl.load(rows + SLOTS)
            segment = tl.load(rows + SEGMENT)
            lane = tl.arange(0, BLOCK)
            collected = tl.zeros([BLOCK], tl.int64)
            full = tl.zeros([BLOCK], tl.int32)
            for first in range(0, slots, BLOCK):
                count = tl.load(filled + 32 * (tl.load(rows + SLOT) + first + lane), mask=first + lane < slots, other=0)
                collected += count
                full += (count > segment).to(tl.int32)
            if (tl.sum(full) == 0) & (above < k) & (k <= above + equal + tl.sum(collected)):
                tl.store(settled + MODE, MODE_COLLECTED)
                rank = k - above - tl.where(k > over, equal, 0)
            else:
                tl.store(settled + MODE, MODE_SLOW)
                tl.store(any_slow, tl.full([], 1, tl.int64))  # every program that stores, stores the same
                rank = k
    state = states + r * ((BITS + 7) // 8 + 1) * 2
    tl.store(state, tl.zeros([], tl.int64))
    tl.store(state + 1, rank)


@triton.jit
def settle_kernel(rows, settled, states, histograms, BITS: tl.constexpr):
    """Per row the key, the rank of the last tie that is kept, and the cut that keeps all ties, which cut_kernel may replace."""
    r = tl.program_id(0).to(tl.int64)
    settled += r * SETTLED_WORDS
    mode = tl.load(settled + MODE)
    if mode != SETTLED:
        tl.store(settled + CUT, tl.load(rows + r * WORDS + N) - 1)
        if mode != MODE_MID:
            key, rank = advance(states, histograms, r, (BITS + 7) // 8, BITS)
            tl.store(settled + FOUND, key)
            tl.store(settled + TIE_RANK, rank)


@triton.jit(do_not_specialize=["chunks"])
def tally_found_kernel(
    pieces, filled, keys, found_chunk,  # as radix_kernel has them, and the keys' chunks
    settled,
    equal,  # int32 [MODELS, chunks], added to
    chunks,
    MODELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the collected keys that equal the k-th, per chunk."""
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(pieces + 3 * piece)
    settled += row * SETTLED_WORDS
    if tl.load(settled + MODE) == MODE_COLLECTED:
        at = tl.load(pieces + 3 * piece + 1)
        count = tl.minimum(tl.load(pieces + 3 * piece + 2), tl.load(filled + 32 * piece))
        found = tl.load(settled + FOUND).to(keys.dtype.element_ty)
        equal += (row % MODELS) * chunks
        lane = tl.arange(0, BLOCK)
        for first in range(0, count, BLOCK):
            inside = first + lane < count
            tie = tl.load(keys + at + first + lane, mask=inside, other=-1) == found
            chunk = tl.load(found_chunk + at + first + lane, mask=tie, other=0)
            tl.atomic_add(equal + chunk, 1, mask=tie, sem="relaxed")


@triton.jit
def publish_kernel(table, places, settled, MODELS: tl.constexpr, PADDED: tl.constexpr, TO: tl.constexpr):
    """Puts each model's (key, cut) into a tensor's row, the cut as an index of the tensor: -1 keeps no tie, size - 1 all.

    places: int64, where the rows start; TO: which of a model's words.
    """
    row = table + tl.load(places + tl.program_id(0))
    m = tl.arange(0, PADDED)
    settled += (tl.load(row + SELECTION_WORD) + m) * SETTLED_WORDS
    key = tl.load(settled + FOUND, mask=m < MODELS, other=0)
    cut = tl.load(settled + CUT, mask=m < MODELS, other=0) - tl.load(row + OFFSET_WORD)
    cut = tl.minimum(tl.maximum(cut, -1), tl.load(row) - 1)
    to = row + ROW_HEADER + ROW_MODEL * m + TO
    tl.store(to, key, mask=m < MODELS)
    tl.store(to + 1, cut, mask=m < MODELS)
