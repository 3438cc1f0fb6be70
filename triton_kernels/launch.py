"""Many tensors in few launches: everything a launch needs to know lies in one packed int64 tensor that is copied to the device once.

The table's words:

    header   HEADER words, zero: what kernels report (WORD_NOT_FINITE)
    rows     per tensor: the words that the kernel asks for; the first is the number of elements
    chunks   per CHUNK elements of a tensor: where its row starts in the table, and the chunk's first element

A program takes one chunk. Rows are sorted into groups that share their dtypes and alignment, a launch each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from .compat import LAUNCH_OPTIONS

__all__ = ["BLOCK", "CHUNK", "Finite", "Group", "Row", "Table", "aligned", "bits_of", "block_of", "launch", "tl_dtype"]

BLOCK = 1024  # elements at a time: 8 a thread, 16 bytes of a half type
CHUNK = 16 * BLOCK  # and of half of it where the arithmetic is fp64, whose registers are two
HEADER = 2
WORD_NOT_FINITE = 0

_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return _TL[dtype]


def block_of(compute: tl.dtype) -> int:
    """Elements that a program works on at a time."""
    return BLOCK // 2 if compute == tl.float64 else BLOCK


def aligned(tensors: Sequence[Tensor | None]) -> bool:
    """Whether 128-bit accesses are right for all of them."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def bits_of(value: float, dtype: torch.dtype) -> int:
    """The bits of a number rounded once to the compute dtype."""
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    return int(rounded.view(torch.int64 if dtype == torch.float64 else torch.int32))


@dataclass(frozen=True)
class Row:
    """One tensor's part of a table: `words[0]` is its size, `group` is what its launch must know at compile time."""

    group: Hashable
    words: list[int]


@dataclass(frozen=True)
class Group:
    """Chunks that one launch covers: their place in the table, and how many."""

    key: Hashable
    chunks_at: int
    chunks: int


class Table:
    """Rows and their chunks on the device; `chunk_rows` and `chunk_first` say on the host what a chunk is, in the launches' order."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        words = [0] * HEADER
        self.row_at: list[int] = []
        for row in rows:
            self.row_at.append(len(words))
            words += row.words
        keys = list(dict.fromkeys(row.group for row in rows))
        order = [r for key in keys for r, row in enumerate(rows) if row.group == key]
        counts = [-(-rows[r].words[0] // CHUNK) for r in order]
        total = sum(counts)
        repeated = torch.repeat_interleave(torch.arange(len(order)), torch.tensor(counts, dtype=torch.int64))
        begin = torch.cumsum(torch.tensor([0, *counts], dtype=torch.int64), 0)[:-1]
        self.chunk_first = (torch.arange(total) - begin[repeated]) * CHUNK
        self.chunk_rows = torch.tensor(order, dtype=torch.int64)[repeated]
        starts = torch.tensor(self.row_at, dtype=torch.int64)[self.chunk_rows]
        host = torch.cat([torch.tensor(words, dtype=torch.int64), torch.stack([starts, self.chunk_first], 1).reshape(-1)])
        if device.type == "cuda":
            host = host.pin_memory()
        self.words = host.to(device, non_blocking=True)
        self.chunks_at = len(words)
        self.groups: list[Group] = []
        done = 0
        for key in keys:
            size = sum(c for r, c in zip(order, counts) if rows[r].group == key)
            self.groups.append(Group(key, self.chunks_at + 2 * done, size))
            done += size


class Finite:
    """Whether all deltas of a launch were finite, read from the device when somebody asks."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables

    def __bool__(self) -> bool:
        return all(int(table.words[WORD_NOT_FINITE]) == 0 for table in self._tables)


def launch(kernel, programs: int, device: torch.device, *args, **constants) -> None:
    """Run `kernel` on a one-dimensional grid; nothing at all for no programs."""
    if programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **constants, **LAUNCH_OPTIONS)
