"""Many tensors in few launches: everything a launch needs to know lies in one packed int64 tensor that is copied to the device once.

The table's words:

    header   word 0: set when a kernel met a value that is not finite; then words for what kernels add up
    rows     per tensor: the words that the kernel asks for; the first is the number of elements
    chunks   per CHUNK elements of a tensor: where its row starts in the table, and the chunk's first element
    entries  on request: per chunk, the tensors in the order of the rows, where its two words are

A program takes one chunk. Chunks are sorted into groups that share their dtypes and alignment, a launch each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from .compat import LAUNCH_OPTIONS

__all__ = [
    "BLOCK", "CHUNK", "Finite", "Group", "Row", "Table", "aligned", "arena", "bits_of", "block_of", "chunks_of", "launch", "pack",
    "tl_dtype",
]  # fmt: skip

BLOCK = 1024  # elements at a time: 8 a thread, 16 bytes of a half type
CHUNK = 16 * BLOCK  # and of half of it where the arithmetic is fp64, whose registers are two
WORD_NOT_FINITE = 0

_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return _TL[dtype]


def block_of(compute: tl.dtype) -> int:
    """Elements that a program works on at a time."""
    return BLOCK // 2 if compute == tl.float64 else BLOCK


def chunks_of(n: int) -> int:
    """How many chunks n elements make."""
    return -(-n // CHUNK)


def aligned(tensors: Sequence[Tensor | None]) -> bool:
    """Whether 128-bit accesses are right for all of them."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def bits_of(value: float, dtype: torch.dtype) -> int:
    """The bits of a number rounded once to the compute dtype."""
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    return int(rounded.view(torch.int64 if dtype == torch.float64 else torch.int32))


def pack(device: torch.device, *parts: Tensor | Sequence[int]) -> list[Tensor]:
    """int64 tensors on the device with the parts' values, by one copy that does not wait."""
    tensors = [torch.as_tensor(part, dtype=torch.int64).reshape(-1) for part in parts]
    host = torch.cat(tensors)
    if device.type == "cuda":
        host = host.pin_memory()
    return list(host.to(device, non_blocking=True).split([t.numel() for t in tensors]))


def arena(device: torch.device, *parts: tuple[int, torch.dtype]) -> tuple[Tensor, list[Tensor]]:
    """One piece of memory, and (count, dtype) each a part of it: what is zeroed together lies together."""
    sizes = [-(-count * dtype.itemsize // 128) * 128 for count, dtype in parts]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    views, start = [], 0
    for (count, dtype), size in zip(parts, sizes):
        views.append(whole[start : start + count * dtype.itemsize].view(dtype))
        start += size
    return whole, views


@dataclass(frozen=True)
class Row:
    """One tensor's part of a table: `words[0]` is its size, `group` is what its launch must know at compile time.

    Elements before `first`, a multiple of BLOCK, are not there: no chunk has them. A slice of a tensor is a row that ends with it and whose
    addresses are those that the whole tensor would have, so that kernels see every element under its index in the tensor.
    """

    group: Hashable
    words: list[int]
    first: int = 0

    @property
    def chunks(self) -> int:
        return chunks_of(self.words[0] - self.first)


@dataclass(frozen=True)
class Group:
    """Chunks that one launch covers: their place in the table, and how many."""

    key: Hashable
    chunks_at: int
    chunks: int


class Table:
    """Rows and their chunks on the device; `row_at` says where a row's words start, `group_of` which launch has its chunks."""

    def __init__(
        self, rows: Sequence[Row], device: torch.device, *, sums: int = 0, given: Sequence[int] = (), entries: bool = False
    ) -> None:
        """`sums` header words are zeroed by `reset`, those `given` after them are not."""
        words = [0] * (1 + sums) + list(given)
        self._zeroed = 1 + sums
        self.chunk = CHUNK
        self.row_at: list[int] = []
        for row in rows:
            self.row_at.append(len(words))
            words += row.words
        keys = list(dict.fromkeys(row.group for row in rows))
        order = sorted(range(len(rows)), key=lambda r: keys.index(rows[r].group))
        counts = torch.tensor([rows[r].chunks for r in order], dtype=torch.int64)
        self.chunks = int(counts.sum())
        of_row = torch.repeat_interleave(torch.arange(len(order)), counts)
        within = torch.arange(self.chunks) - (torch.cumsum(counts, 0) - counts)[of_row]
        rows_of_chunks = torch.tensor(order, dtype=torch.int64)[of_row]
        starts = torch.tensor(self.row_at, dtype=torch.int64)[rows_of_chunks]
        first = torch.tensor([row.first for row in rows], dtype=torch.int64)[rows_of_chunks]
        parts = [torch.tensor(words, dtype=torch.int64), torch.stack([starts, first + within * CHUNK], 1).reshape(-1)]
        if entries:
            # Stable: a row's chunks stay in order.
            parts.append(len(words) + 2 * torch.argsort(rows_of_chunks, stable=True))
        self.entries_at = len(words) + 2 * self.chunks
        (self.words,) = pack(device, torch.cat(parts))
        self.groups: list[Group] = []
        at = len(words)
        for key in keys:
            size = sum(row.chunks for row in rows if row.group == key)
            self.groups.append(Group(key, at, size))
            at += 2 * size
        self.group_of = [self.groups[keys.index(row.group)] for row in rows]

    def reset(self) -> None:
        """Before another run: nothing was found, nothing added up."""
        self.words[: self._zeroed].zero_()


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
