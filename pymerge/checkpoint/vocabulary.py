"""Embeddings and heads in the order of another vocabulary, put together while they are read.

A row of a re-ordered tensor is a row of the model's own tensor, a row of another model's, the mean of several models' rows, zeros, or
padding (:class:`Rows`). Nothing is materialised: a range of bytes is gathered when it is asked for, with one read per stretch of rows
that lie together in their file, so that a vocabulary to which a few tokens were added is read like any other tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import dtypes
from .format import TensorInfo
from .store import TensorStore

__all__ = ["MEAN", "PADDING", "ZERO", "ReorderedTensor", "Rows", "VocabularyStore"]

ZERO, MEAN, PADDING = -1, -2, -3

BLOCK = 4 << 20
"""Bytes of scratch memory for one read."""

GAP = 32 << 10
"""Bytes that are cheaper read over than skipped: a read of its own costs about 10 microseconds, in which warm memory gives 32 KiB."""

DIRECT = 64 << 10
"""Bytes from which on a stretch of rows is read straight to where it belongs."""

SUMMED = 16384
"""Elements that torch (at least 32768 per thread) sums on one thread: only so is the order of additions always the same."""


@dataclass(frozen=True)
class Rows:
    """Where the n rows of a re-ordered tensor come from.

    Attributes:
        source: int64 [n]: index into the sources; ZERO for zeros; MEAN for the mean of several sources' rows; PADDING for the mean of all
            rows that are not padding.
        row: int64 [n]: the row of that source; for MEAN, the column of `members`.
        members: int64 [sources, k]: the row of each source that takes part in the k-th mean, -1 for a source that does not.
    """

    source: Tensor
    row: Tensor
    members: Tensor


class ReorderedTensor:
    """One tensor in the order of another vocabulary.

    Means are added in fp32 (fp64 for fp64) in the order of the sources, divided by their number and rounded once. The mean of all rows, for
    padding, is computed in fp64; it is read for when padding is first asked for.

    Args:
        name: of the tensor.
        sources: (store, where the tensor lies in it): [vocabulary, ...], all with the same shape beyond the first dimension.
        own: index of the source that the tensor stands for.
        rows: where each row comes from.

    Attributes:
        info: name, shape, and the narrowest dtype that holds the rows of all sources that are used.
    """

    def __init__(self, name: str, sources: Sequence[tuple[TensorStore, TensorInfo]], own: int, rows: Rows) -> None:
        self._sources = tuple(sources)
        self._rows = rows
        self._used = set(rows.source.unique().tolist())
        if MEAN in self._used:
            self._used |= set((rows.members >= 0).any(1).nonzero().flatten().tolist())
        code = dtypes.promote(info.dtype for i, (_, info) in enumerate(sources) if i in self._used or i == own)
        beyond = sources[own][1].shape[1:]
        width = TensorInfo("", code, beyond, Path(), 0, 0).numel
        self._dtype = dtypes.torch_dtype(code)
        self._compute = torch.float64 if code == "F64" else torch.float32
        self._width = width
        self._row_bytes = width * dtypes.BITS[code] // 8
        # torch moves rows element by element, so the larger the element the better.
        self._unit = next(unit for unit in (torch.int64, torch.int32, torch.int16, torch.uint8) if self._row_bytes % unit.itemsize == 0)
        count = len(rows.source)
        self.info = TensorInfo(name, code, (count, *beyond), sources[own][1].file, 0, count * self._row_bytes)
        self._padding: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def used(self) -> list[TensorStore]:
        """The stores that rows come from."""
        return [store for i, (store, _) in enumerate(self._sources) if i in self._used]

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill `target` with the bytes from `start` on."""
        while len(target):
            row, skip = divmod(start, self._row_bytes)
            if skip or len(target) < self._row_bytes:
                part = bytearray(self._row_bytes)
                self._fill(row, part)
                take = min(self._row_bytes - skip, len(target))
                target[:take] = part[skip : skip + take]
            else:
                take = len(target) // self._row_bytes * self._row_bytes
                self._fill(row, target[:take])
            start, target = start + take, target[take:]

    def _fill(self, first: int, memory: memoryview | bytearray, padding: bool = True) -> None:
        """Whole rows from row `first` on; without `padding` its rows stay as they are."""
        out = self._as_rows(memory)
        source, row = self._rows.source[first : first + len(out)], self._rows.row[first : first + len(out)]
        for number in source.unique().tolist():
            at = (source == number).nonzero().flatten()
            if number == ZERO:
                out[at] = 0
            elif number == MEAN:
                self._means(row[at], at, out)
            elif number == PADDING:
                if padding:
                    out[at] = self._padding_row().view(out.dtype)
            else:
                self._gather(number, row[at], at, out, memoryview(memory))

    def _as_rows(self, memory: memoryview | bytearray, unit: torch.dtype | None = None) -> Tensor:
        """[rows, units of a row]."""
        out = torch.frombuffer(memory, dtype=torch.uint8)
        if unit is None:
            unit = self._unit if out.data_ptr() % self._unit.itemsize == 0 else torch.uint8
        return out.view(unit).view(-1, self._row_bytes // unit.itemsize)

    def _gather(self, number: int, rows: Tensor, at: Tensor, out: Tensor, memory: memoryview) -> None:
        """out[at] = the rows of a source; `memory` is that of `out`."""
        breaks = ((rows.diff() != 1) | (at.diff() != 1)).nonzero().flatten() + 1
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), breaks])
        lengths = torch.cat([breaks, torch.tensor([len(rows)])]) - starts
        long = lengths * self._row_bytes >= DIRECT
        for start, length in zip(starts[long].tolist(), lengths[long].tolist(), strict=True):
            begin = int(at[start]) * self._row_bytes
            self._read(number, int(rows[start]), memory[begin : begin + length * self._row_bytes])
        scattered = (~long).repeat_interleave(lengths)
        rows, at = rows[scattered], at[scattered]
        if len(rows):
            self._gather_scattered(number, rows, at, out)

    def _gather_scattered(self, number: int, rows: Tensor, at: Tensor, out: Tensor) -> None:
        """The same for rows here and there: neighbours are read in one piece, and many pieces are put in place at once."""
        rows, order = rows.sort()
        at = at[order]
        in_block = rows * self._row_bytes // BLOCK
        new = torch.ones(len(rows), dtype=torch.bool)  # where a piece begins
        new[1:] = (rows.diff() * self._row_bytes > GAP) | (in_block.diff() != 0)
        first = new.nonzero().flatten()
        low = rows[first]
        count = rows[torch.cat([first[1:], torch.tensor([len(rows)])]) - 1] + 1 - low
        begin = count.cumsum(0) - count  # of each piece, in rows, if all lay one after another
        there = (begin - low)[new.cumsum(0) - 1] + rows
        batch = (begin * self._row_bytes // BLOCK).unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
        low, count, begin, first = low.tolist(), count.tolist(), begin.tolist(), [*first.tolist(), len(rows)]
        for start, end in zip([0, *batch], batch):
            base = begin[start]
            scratch = bytearray((begin[end - 1] + count[end - 1] - base) * self._row_bytes)
            view = memoryview(scratch)
            for piece in range(start, end):
                position = (begin[piece] - base) * self._row_bytes
                self._read(number, low[piece], view[position : position + count[piece] * self._row_bytes])
            members = slice(first[start], first[end])
            out[at[members]] = self._as_rows(scratch, out.dtype).index_select(0, there[members] - base)

    def _read(self, number: int, row: int, target: memoryview) -> None:
        """Consecutive rows of a source, in this tensor's dtype."""
        store, info = self._sources[number]
        if info.dtype == self.info.dtype:
            store.read_into(info, target, row * self._row_bytes)
            return
        row_bytes = self._width * dtypes.BITS[info.dtype] // 8
        step, count = max(1, BLOCK // row_bytes), len(target) // self._row_bytes
        for begin in range(0, count, step):
            end = min(begin + step, count)
            narrow = bytearray((end - begin) * row_bytes)
            store.read_into(info, memoryview(narrow), (row + begin) * row_bytes)
            wide = torch.frombuffer(narrow, dtype=dtypes.torch_dtype(info.dtype)).to(self._dtype)
            piece = target[begin * self._row_bytes : end * self._row_bytes]
            torch.frombuffer(piece, dtype=torch.uint8).copy_(wide.view(torch.uint8))

    def _means(self, columns: Tensor, at: Tensor, out: Tensor) -> None:
        """out[at] = the means."""
        step = max(1, BLOCK // (self._width * self._compute.itemsize))
        for some, there in zip(columns.split(step), at.split(step)):
            total = torch.zeros(len(some), self._width, dtype=self._compute)
            members = self._rows.members[:, some]
            for number, rows in enumerate(members):
                present = (rows >= 0).nonzero().flatten()
                if len(present):
                    total[present] += self._values(number, rows[present]).to(self._compute)
            total /= (members >= 0).sum(0).unsqueeze(1)
            out[there] = total.to(self._dtype).view(out.dtype)

    def _values(self, number: int, rows: Tensor) -> Tensor:
        memory = bytearray(len(rows) * self._row_bytes)
        self._gather(number, rows, torch.arange(len(rows)), self._as_rows(memory), memoryview(memory))
        return torch.frombuffer(memory, dtype=self._dtype).view(-1, self._width)

    def _padding_row(self) -> Tensor:
        with self._lock:
            if self._padding is None:
                self._padding = self._mean_of_rows().to(self._dtype).view(torch.uint8)
            return self._padding

    def _mean_of_rows(self) -> Tensor:
        """fp64 [width]: of all rows that are not padding; the order of additions depends on the shape alone."""
        real = self._rows.source != PADDING
        total = torch.zeros(self._width, dtype=torch.float64)
        step = max(1, BLOCK // self._row_bytes)
        end = int(real.nonzero().max()) + 1 if real.any() else 0
        for first in range(0, end, step):
            count = min(step, end - first)
            memory = bytearray(count * self._row_bytes)
            self._fill(first, memory, padding=False)
            values = torch.frombuffer(memory, dtype=self._dtype).view(count, self._width)[real[first : first + count]]
            for piece in values.split(max(1, SUMMED // self._width)):
                total += piece.double().sum(0)
        return total / max(1, int(real.sum()))


class VocabularyStore:
    """A store some of whose tensors are in the order of another vocabulary; all others are passed through.

    Re-ordered tensors that the store does not have (the head of a model that ties it to its embedding) come last.

    Attributes:
        path, folder: of the store.
        files: of the store and of those whose rows it takes, and those that say which rows.
        tensors: name -> where it lies, in the store's order; a re-ordered tensor has the output's number of rows.
        nbytes: of all tensors.
    """

    def __init__(self, store: TensorStore, reordered: Mapping[str, ReorderedTensor], files: Iterable[Path] = ()) -> None:
        self.path = store.path
        self.folder = store.folder
        self._stores = list({id(s): s for s in [store, *(s for tensor in reordered.values() for s in tensor.used)]}.values())
        self.files: tuple[Path, ...] = tuple(dict.fromkeys([*(file for s in self._stores for file in s.files), *files]))
        self.tensors: dict[str, TensorInfo] = {**store.tensors, **{name: tensor.info for name, tensor in reordered.items()}}
        self.nbytes = sum(info.nbytes for info in self.tensors.values())
        self._reordered = dict(reordered)

    def read_into(self, info: TensorInfo, target: memoryview, start: int = 0) -> None:
        """Fill `target` with the bytes of a tensor from its byte `start` on. Safe to call from several threads.

        Raises:
            CheckpointError: a file ended, changed since its header was read, or cannot be read.
        """
        if info.name not in self._reordered:
            self._stores[0].read_into(info, target, start)
            return
        if start + len(target) > info.nbytes:
            raise ValueError(f"{info.name!r} has {info.nbytes} bytes; {len(target)} from byte {start} were asked for")
        self._reordered[info.name].read_into(target, start)

    def close(self) -> None:
        """Close the files, those of other stores whose rows are used too. Reading opens them again."""
        for store in self._stores:
            store.close()

    def __enter__(self) -> VocabularyStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()
