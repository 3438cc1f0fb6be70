"""Exact selection by magnitude: for every model the pair (key, cut) of :func:`pymerge.reference.select`.

As on the CPU: a sample gives a bracket that almost surely holds the k-th key; one pass counts what lies above it, counts its middle key per
chunk and collects the other keys inside; the counts prove the bracket, and the rest is a sort of the few collected keys. A bracket that
missed, or that held too much, costs passes that find the key four bits at a time, and is exact as well. The sample affects the speed only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import select as kernels
from .launch import CHUNK, Row, Table, aligned, block_of, launch, tl_dtype

__all__ = ["Selector"]

SMALL = 1 << 15  # up to here all keys are sorted
RUN = 16  # sampled elements come in runs of a cache line or two
DIGIT = 4  # bits of the key that a slow pass finds
SLOTS = 64
NONE_KEPT = (2**63 - 1, -1)


class Selector:
    """Selections over the tensors `models[i]` of each model, taken as one; all flat, on one device, one compute dtype."""

    def __init__(self, bases: Sequence[Tensor] | None, models: Sequence[Sequence[Tensor]], compute: torch.dtype) -> None:
        self.device = models[0][0].device
        self.models = len(models)
        self.bits = 63 if compute == torch.float64 else 31
        self.key_dtype = torch.int64 if compute == torch.float64 else torch.int32
        rows, offsets, offset = [], [], 0
        for j, first in enumerate(models[0]):
            base, column = (bases[j] if bases else None), [row[j] for row in models]
            key = (None if base is None else tl_dtype(base.dtype), tl_dtype(first.dtype), aligned([base, *column]))
            address = 0 if base is None else base.data_ptr()
            rows.append(Row(key, [first.numel(), offset, address, *(t.data_ptr() for t in column)]))
            offsets.append(offset)
            offset += first.numel()
        self.n = offset
        self.compute = tl_dtype(compute)
        self.rows = rows
        self.table = Table(rows, self.device)
        self.offsets = torch.tensor(offsets, dtype=torch.int64)
        self.chunk_flat = self.offsets[self.table.chunk_rows] + self.table.chunk_first
        self.chunk_order = torch.argsort(self.chunk_flat)

    def run(self, counts: Sequence[int], tie_all: bool) -> list[tuple[int, int]]:
        """(key, cut) of the counts[i] largest of each model."""
        result = [NONE_KEPT if k <= 0 or self.n == 0 else (0, self.n - 1) for k in counts]
        pending = [m for m, k in enumerate(counts) if 0 < k < self.n]
        if not pending:
            return result
        if self.n <= SMALL:
            for m in pending:
                keys = self._keys(m)
                key = int(torch.sort(keys, descending=True).values[counts[m] - 1])
                rank = counts[m] - int((keys > key).sum())
                result[m] = (key, self.n - 1 if tie_all else int(torch.nonzero(keys == key)[rank - 1]))
            return result
        brackets = self._guess(counts)
        missed = []
        counted = self._count(brackets)
        for m in pending:
            found = counted.finish(m, counts[m], brackets[m], tie_all)
            if found is None:
                missed.append(m)
            else:
                result[m] = found
        if missed:
            exact = self._by_digits(counts)
            counted = self._count([(key, key, key) for key in exact])
            for m in missed:
                result[m] = counted.finish(m, counts[m], (exact[m],) * 3, tie_all)
        return result

    # ---- launches

    def _launch(self, kernel, group, programs, *args, **constants) -> None:
        base, model, is_aligned = group.key
        if kernel is not kernels.sample_kernel:
            constants |= {"ALIGNED": is_aligned, "CHUNK": CHUNK, "BLOCK": block_of(self.compute)}
        launch(
            kernel, programs, self.device, self.table.words, *args, HAS_BASE=base is not None, BASE=base or model, MODEL=model,
            COMPUTE=self.compute, **constants,
        )  # fmt: skip

    def _keys(self, m: int) -> Tensor:
        keys = torch.empty(self.n, dtype=self.key_dtype, device=self.device)
        for group in self.table.groups:
            self._launch(kernels.keys_kernel, group, group.chunks, group.chunks_at, m, 0, keys)
        return keys

    def chunk_keys(self, m: int, chunk: int) -> Tensor:
        """Keys of one chunk again."""
        size = min(CHUNK, self.rows[int(self.table.chunk_rows[chunk])].words[0] - int(self.table.chunk_first[chunk]))
        keys = torch.empty(size, dtype=self.key_dtype, device=self.device)
        at = self.table.chunks_at + 2 * chunk
        group = next(g for g in self.table.groups if g.chunks_at <= at < g.chunks_at + 2 * g.chunks)
        self._launch(kernels.keys_kernel, group, 1, at, m, int(self.chunk_flat[chunk]), keys)
        return keys

    def _guess(self, counts: Sequence[int]) -> list[tuple[int, int, int]]:
        """Per model a bracket (lo, mid, hi) of keys, from runs at jittered positions."""
        runs = min(max(self.n // 64 // RUN, 256), 8192)
        stride = self.n // runs
        generator = torch.Generator().manual_seed(0)
        flat = torch.arange(runs) * stride + torch.randint(stride, (runs,), generator=generator)
        row = torch.searchsorted(self.offsets, flat, right=True) - 1  # the last of equal offsets: an empty tensor comes before
        sizes = torch.tensor([r.words[0] for r in self.rows])[row]
        first = torch.minimum(flat - self.offsets[row], (sizes - RUN).clamp(min=0))
        samples = []
        for key in dict.fromkeys(r.group[:2] for r in self.rows):
            mine = torch.tensor([r.group[:2] == key for r in self.rows])[row]
            place = torch.tensor(self.table.row_at)[row[mine]]
            table = torch.stack([place, first[mine]], 1).contiguous().to(self.device)
            keys = torch.empty((self.models, len(place) * RUN), dtype=self.key_dtype, device=self.device)
            group = next(g for g in self.table.groups if g.key[:2] == key)
            programs = -(-len(place) // SLOTS) * self.models
            self._launch(kernels.sample_kernel, group, programs, table, keys, len(place), MODELS=self.models, RUN=RUN, TOGETHER=SLOTS)
            samples.append(keys)
        sample = torch.sort(torch.cat(samples, 1), 1, descending=True).values
        size = int((sample[0] >= 0).sum())
        top = 2**self.bits - 1
        ranks = []
        for k in counts:
            p = min(max(k / self.n, 0.0), 1.0)
            spread = 6 * (size * p * (1 - p)) ** 0.5 + 2
            ranks.append([p * size + spread, p * size, p * size - spread])
        at = torch.tensor(ranks, dtype=torch.float64).long().clamp(0, size - 1).to(self.device)
        values = torch.gather(sample, 1, at).tolist()
        return [
            (lo if low < size - 1 else 0, mid, hi if high > 0 else top) for (lo, mid, hi), (low, _, high) in zip(values, ranks, strict=True)
        ]

    def _count(self, brackets: Sequence[tuple[int, int, int]]) -> _Counted:
        chunks = len(self.chunk_flat)
        slots = min(SLOTS, chunks)
        # An eighth of the elements, and never less than a chunk has.
        segment = max(CHUNK, -(-chunks // slots) * CHUNK // 8)
        counted = _Counted(self, chunks, slots, segment)
        limits = torch.tensor(brackets, dtype=torch.int64).to(self.device)
        before = 0
        for group in self.table.groups:
            self._launch(
                kernels.bracket_kernel, group, group.chunks * self.models, group.chunks_at, before, chunks, limits, counted.counts,
                counted.filled, counted.keys, counted.index, slots, segment, MODELS=self.models,
            )  # fmt: skip
            before += group.chunks
        counted.read()
        return counted

    def _by_digits(self, counts: Sequence[int]) -> list[int]:
        """The k-th key of each model, from its highest bits to its lowest."""
        found = [0] * self.models
        pivots_per_pass = 2**DIGIT - 1
        for shift in reversed(range(0, self.bits, DIGIT)):
            pivots = [[f + (j << shift) for j in range(1, pivots_per_pass + 1)] for f in found]
            usable = [[p for p in row if p < 2**self.bits] for row in pivots]
            table = torch.tensor([[min(p, 2**63 - 1) for p in row] for row in pivots], dtype=torch.int64).to(self.device)
            reached = torch.zeros((self.models, pivots_per_pass), dtype=torch.int64, device=self.device)
            for group in self.table.groups:
                self._launch(
                    kernels.pivots_kernel, group, group.chunks * self.models, group.chunks_at, table, reached,
                    MODELS=self.models, PIVOTS=pivots_per_pass,
                )  # fmt: skip
            for m, (row, k) in enumerate(zip(reached.tolist(), counts, strict=True)):
                found[m] = max([found[m], *(p for p, count in zip(usable[m], row) if count >= k)])
        return found


class _Counted:
    """What one pass over the data counted and collected."""

    def __init__(self, selector: Selector, chunks: int, slots: int, segment: int) -> None:
        device, models = selector.device, selector.models
        self.selector = selector
        self.counts = torch.empty((models, 2, chunks), dtype=torch.int64, device=device)
        self.filled = torch.zeros((models, slots, 32), dtype=torch.int32, device=device)
        self.keys = torch.empty((models, slots, segment), dtype=selector.key_dtype, device=device)
        self.index = torch.empty((models, slots, segment), dtype=torch.int64, device=device)

    def read(self) -> None:
        self.counts = self.counts.cpu()
        self.filled = self.filled[:, :, 0].cpu()

    def finish(self, m: int, k: int, bracket: tuple[int, int, int], tie_all: bool) -> tuple[int, int] | None:
        """Selects among what was counted and collected; None when that does not contain the k-th key."""
        mid = bracket[1]
        segment = self.keys.shape[2]
        above, equal = self.counts[m].sum(1).tolist()
        collected = int(self.filled[m].sum())
        if int(self.filled[m].max()) > segment or not above < k <= above + equal + collected:
            return None
        valid = (torch.arange(segment)[None, :] < self.filled[m][:, None]).to(self.keys.device)
        keys, index = self.keys[m][valid], self.index[m][valid]
        upper = int((keys > mid).sum())
        last = self.selector.n - 1
        if above + upper < k <= above + upper + equal:
            return mid, last if tie_all else self._cut_at_mid(m, mid, k - above - upper)
        others = equal if k > above + upper else 0  # keys equal to mid that come before the k-th
        key = int(torch.sort(keys, descending=True).values[k - above - others - 1])
        rank = k - above - others - int((keys > key).sum())
        return key, last if tie_all else int(torch.sort(index[keys == key]).values[rank - 1])

    def _cut_at_mid(self, m: int, mid: int, rank: int) -> int:
        """Flat index of the rank-th element whose key is mid: counts lead to its chunk, and only that is looked at again."""
        selector = self.selector
        reached = torch.cumsum(self.counts[m, 1][selector.chunk_order], 0)
        place = int(torch.searchsorted(reached, rank))
        chunk = int(selector.chunk_order[place])
        rank -= int(reached[place - 1]) if place else 0
        within = torch.nonzero(selector.chunk_keys(m, chunk) == mid).reshape(-1)[rank - 1]
        return int(selector.chunk_flat[chunk]) + int(within)
