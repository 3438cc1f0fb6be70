"""Exact selection by magnitude for all tensors and models at once: per row the pair (key, cut) of :func:`pymerge.reference.select`.

A row is one model of what is ranked together, a tensor or several. Everything stays on the device, the number of launches depends on the
kinds of dtype alone, and `run` neither waits nor allocates:

1. A sample gives each row a bracket that almost surely holds its k-th key (rows of few elements: everything).
2. One pass over the data counts what lies above the bracket, above its middle key and equal to that, and collects the other keys inside.
3. The counts prove where the k-th key is: it is the middle, or the so-many-th of those collected, or the bracket missed or its room
   overflowed. In the last case the key is found in passes over that row's data, so the result is always exact.
4. Where ties are broken they are counted per chunk, and the chunk of the last one kept is looked at again.

The sample affects the speed only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from . import rank, select
from .launch import BLOCK, Group, Table, arena, block_of, chunks_of, launch, pack, tl_dtype
from .rows import KEY_WORD

__all__ = ["Segment", "Selection"]

DIRECT = 1 << 12  # rows up to here are collected whole
RUN = 16  # sampled elements come in runs of a cache line or two
RUNS = 1 << 16  # at most
TOGETHER = 64  # runs of one program
PIECE = 1 << 13  # sampled keys of one program
DEVIATIONS = 4.5  # half a bracket; a sample this far off comes once in 150,000 rows, and costs time only
CHUNKS_PER_SLOT = 16
MAX_SLOTS = 512
PERSISTENT = 1024  # programs of a pass over the data that is rarely needed
WALK = 1024


@dataclass(frozen=True)
class Segment:
    """What is ranked together: rows of the table, and how many elements each model keeps, 0 < k < n; 0 where `answers` has the result."""

    tensors: Sequence[int]
    counts: Sequence[int]
    answers: Sequence[tuple[int, int]]


def _room(n: int, expected: float) -> int:
    """Keys that a row may collect: half more than expected in its bracket, and a sixteenth of all for keys that many elements share."""
    return min(n, int(1.5 * expected) + n // 16 + 64)


@dataclass
class _Layout:
    """What the host works out, as lists of words."""

    rows: list[int] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)  # of collected keys, one per slot
    sample_pieces: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)  # first states of the samples' order statistics
    units: dict[Group, list[int]] = field(default_factory=dict)
    room: int = 0  # collected keys
    sampled: int = 0  # rows
    samples: int = 0  # keys


class Selection:
    """Selections over tensors of `table` whose arithmetic is `compute`. Side buffers are made here; `run` only launches.

    `sizes` and `offsets` are those of the table's rows: elements, and flat index of the first one in its segment; `first_chunk` numbers
    chunks over all rows; `to` says which of a model's words get the result.
    """

    def __init__(
        self,
        table: Table,
        segments: Sequence[Segment],
        sizes: Sequence[int],
        first_chunk: Sequence[int],
        compute: torch.dtype,
        tie_all: bool,
        to: int = KEY_WORD.value,
    ) -> None:
        wide = compute == torch.float64
        key_dtype = torch.int64 if wide else torch.int32
        self.to = to
        self.table, self.compute, self.tie_all, self.bits = table, tl_dtype(compute), tie_all, 63 if wide else 31
        self.digits = -(-self.bits // 8)
        self.models = len(segments[0].counts)
        self.groups = [g for g in table.groups if g.key[3] == self.compute]
        device = self.device = table.words.device
        layout = _Layout()
        for segment in segments:
            self._lay_out(layout, segment, sizes, first_chunk)
        self.rows_count = len(segments) * self.models
        self.units_at, flat = [], []
        for group in self.groups:
            words = layout.units.get(group, [])
            self.units_at.append((len(flat) // 6, len(words) // 6))
            flat += words
        places = [table.row_at[t] for segment in segments for t in segment.tensors]
        given = pack(device, layout.rows, layout.pieces, layout.sample_pieces, flat, places, layout.states)
        self.rows, self.pieces, self.sample_pieces, self.units, self.places, first_states = given
        jobs = 3 * layout.sampled
        # 64 bits count everything, 32 what is shorter than 2**31.
        largest = max((sum(sizes[t] for t in segment.tensors) for segment in segments), default=0)
        count = torch.int64 if largest >= 2**31 else torch.int32
        slots = len(layout.pieces) // 3
        self._zeroed, (self.counters, self.any_slow, self.filled, self.equal, self.histograms, self.sample_histograms) = arena(
            device, (self.rows_count * rank.COUNTERS.value, torch.int64), (1, torch.int64), (slots * 32, torch.int32),
            (self.models * table.chunks, torch.int32), (self.rows_count * self.digits * 256, count), (jobs * self.digits * 256, count),
        )  # fmt: skip
        _, (self.settled, self.states, self.sample_states, self.equal_mid, self.keys, self.chunk_of, self.sample) = arena(
            device, (self.rows_count * rank.SETTLED_WORDS.value, torch.int64), (self.rows_count * (self.digits + 1) * 2, torch.int64),
            (jobs * (self.digits + 1) * 2, torch.int64), (self.models * table.chunks, torch.int32), (layout.room, key_dtype),
            (layout.room, torch.int32), (layout.samples, key_dtype),
        )  # fmt: skip
        if jobs:
            self.sample_states.view(jobs, -1)[:, :2] = first_states.view(jobs, 2)

    def _lay_out(self, layout: _Layout, segment: Segment, sizes: Sequence[int], first_chunk: Sequence[int]) -> None:
        n = sum(sizes[t] for t in segment.tensors)
        chunk, chunks = first_chunk[segment.tensors[0]], sum(chunks_of(sizes[t]) for t in segment.tensors)
        sample = start = length = 0
        if n > DIRECT and any(segment.counts):
            sample, start, length = self._lay_out_sample(layout, segment, sizes, n)
        for m, (k, answer) in enumerate(zip(segment.counts, segment.answers, strict=True)):
            if k == 0:
                layout.rows += [0, n, 0, 0, 0, 0, -1, chunk, chunks, *answer]
                continue
            room, sampled = n, -1
            if sample:
                p = k / n
                spread = DEVIATIONS * math.sqrt(sample * p * (1 - p)) + 2
                low, high = math.ceil(sample * p + spread), math.floor(sample * p - spread)
                layout.states += [0, low if low <= sample else 0, 0, min(max(round(sample * p), 1), sample), 0, max(high, 0)]
                sampled = layout.sampled
                layout.sampled += 1
                for first in range(0, length, PIECE):
                    layout.sample_pieces += [sampled, start + m * length + first, min(PIECE, length - first)]
                room = _room(n, 2 * spread / sample * n)
            slots = min(max(chunks // CHUNKS_PER_SLOT, 1), MAX_SLOTS)
            each = -(-room // slots) + (64 if slots > 1 else 0)
            row = len(layout.rows) // rank.WORDS.value
            layout.rows += [k, n, len(layout.pieces) // 3, slots, each, layout.room, sampled, chunk, chunks, 0, 0]
            for _ in range(slots):
                layout.pieces += [row, layout.room, each]
                layout.room += each

    def _lay_out_sample(self, layout: _Layout, segment: Segment, sizes: Sequence[int], n: int) -> tuple[int, int, int]:
        """Who reads which runs. Returns how many keys a model's sample has, where they start, and how much room each model's take."""
        # A sixteenth of few elements, a 64th of many: the bracket is as narrow as the square root of the sample is large.
        runs = min(max(n // (64 * RUN), min(n // (16 * RUN), 256)), RUNS)
        stride = n // runs
        start, length = layout.samples, runs * RUN
        layout.samples += self.models * length
        sample = offset = 0
        for t in segment.tensors:
            begin, end = (min(-(-x // stride), runs) for x in (offset, offset + sizes[t]))
            offset += sizes[t]
            sample += (end - begin) * min(RUN, sizes[t])
            for first in range(begin, end, TOGETHER):
                words = layout.units.setdefault(self.table.group_of[t], [])
                words += [self.table.row_at[t], first, min(TOGETHER, end - first), start, length, stride]
        return sample, start, length

    def run(self) -> None:
        """Put the selections into the table's rows."""
        self._zeroed.zero_()
        table, bits = self.table.words, self.bits
        slots, pieces = len(self.pieces) // 3, len(self.sample_pieces) // 3
        for group, (first, units) in zip(self.groups, self.units_at):
            base, model = group.key[:2]
            launch(
                select.sample_kernel, units * self.models, self.device, table, self.units, first, self.sample,
                HAS_BASE=base is not None, BASE=base or model, MODEL=model, COMPUTE=self.compute, MODELS=self.models, RUN=RUN,
                TOGETHER=TOGETHER,
            )  # fmt: skip
        for digit in range(self.digits):
            launch(
                rank.radix_kernel, pieces, self.device, self.sample_pieces, self.filled, self.settled, self.sample, self.sample_states,
                self.sample_histograms, digit, BITS=bits, STATISTICS=3, FILLED=False, BLOCK=BLOCK,
            )  # fmt: skip
        launch(
            rank.bracket_ends_kernel, self.rows_count, self.device, self.rows, self.settled, self.sample_states, self.sample_histograms,
            BITS=bits, SAMPLES=pieces > 0,
        )  # fmt: skip
        for group in self.groups:
            self._over_data(
                select.bracket_kernel, group, group.chunks * self.models, group.chunks_at, self.table.chunks, self.rows, self.settled,
                self.counters, self.equal_mid, self.filled, self.keys, self.chunk_of,
            )  # fmt: skip
        launch(
            rank.where_to_look_kernel, self.rows_count, self.device, self.rows, self.settled, self.counters, self.filled, self.states,
            self.any_slow, BITS=bits, BLOCK=MAX_SLOTS,
        )  # fmt: skip
        for digit in range(self.digits):
            launch(
                rank.radix_kernel, slots, self.device, self.pieces, self.filled, self.settled, self.keys, self.states, self.histograms,
                digit, BITS=bits, STATISTICS=1, FILLED=True, BLOCK=BLOCK,
            )  # fmt: skip
            for group in self.groups:
                self._over_data(
                    select.digits_kernel, group, min(group.chunks * self.models, PERSISTENT), group.chunks_at, group.chunks, self.any_slow,
                    self.settled, self.states, self.histograms, digit, BITS=bits,
                )  # fmt: skip
        launch(rank.settle_kernel, self.rows_count, self.device, self.rows, self.settled, self.states, self.histograms, BITS=bits)
        if not self.tie_all:
            self._cut(slots)
        padded = 1 << (self.models - 1).bit_length()
        launch(
            rank.publish_kernel,
            len(self.places),
            self.device,
            table,
            self.places,
            self.settled,
            MODELS=self.models,
            PADDED=padded,
            TO=self.to,
        )

    def _cut(self, slots: int) -> None:
        chunks = self.table.chunks
        launch(
            rank.tally_found_kernel, slots, self.device, self.pieces, self.filled, self.keys, self.chunk_of, self.settled, self.equal,
            chunks, MODELS=self.models, BLOCK=BLOCK,
        )  # fmt: skip
        for group in self.groups:
            self._over_data(
                select.tally_kernel, group, min(group.chunks * self.models, PERSISTENT), group.chunks_at, group.chunks, self.any_slow,
                self.settled, self.equal, chunks,
            )  # fmt: skip
        for group in self.groups:
            self._over_data(
                select.cut_kernel, group, self.rows_count, self.table.entries_at, group.chunks_at, group.chunks, chunks, self.rows,
                self.settled, self.equal_mid, self.equal, WALK=WALK,
            )  # fmt: skip

    def _over_data(self, kernel, group: Group, programs: int, *args, **constants) -> None:
        base, model, _, compute, is_aligned = group.key
        launch(
            kernel, programs, self.device, self.table.words, *args, HAS_BASE=base is not None, BASE=base or model, MODEL=model,
            COMPUTE=compute, MODELS=self.models, ALIGNED=is_aligned, CHUNK=self.table.chunk, BLOCK=block_of(compute), **constants,
        )  # fmt: skip
