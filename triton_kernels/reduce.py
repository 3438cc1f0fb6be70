"""Whole-tensor sums in fp64 in the one order that every backend uses (docs/arithmetic.md): blocks of 4096, 64 lanes each.

A kernel gives the sums of blocks; they are added in order by one program per sum, or for `dots`, whose result is the caller's, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Table, launch, pack
from .memory import widen
from .rows import BASE_WORD, FACTOR_WORD, FIRST_CHUNK_WORD, ROW_HEADER, ROW_MODEL
from .sparsify import kept_by_chance, kept_by_selection, magnitude_key

__all__ = ["Norms", "abs_sums_kernel", "dots", "dots_kernel", "factor_kernel"]

LANES = tl.constexpr(64)
SUM_BLOCK = tl.constexpr(4096)
TOGETHER = 8  # blocks of one program of `dots`, so that a row of lanes fills its warps
UNROLL = 16


@triton.jit
def _fold(lanes, TOGETHER: tl.constexpr):
    """Lane j += lane j + 32, then 16, ...: [TOGETHER, 64] to [TOGETHER]."""
    for step in tl.static_range(6):
        lanes = tl.sum(tl.reshape(lanes, [TOGETHER, 2, 32 >> step]), axis=1)
    return tl.reshape(lanes, [TOGETHER])


@triton.jit
def _steps_end(n, begin):
    """Where the steps through a block can stop: what is left of a small tensor. Lanes start from +0, so zeros would change nothing."""
    return tl.minimum(n - tl.min(begin), SUM_BLOCK)


@triton.jit
def _load(address, index, n, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    return widen(tl.load(address.to(tl.pointer_type(DTYPE)) + index, mask=index < n, other=0.0), COMPUTE)


@triton.jit(do_not_specialize=["chunks_at", "chunks"])
def abs_sums_kernel(
    table, chunks_at,  # of a merge, see rows.py
    sums,  # fp64 [MODELS, 2, chunks, TOGETHER]: of |delta| and of its kept part
    chunks,  # of all launches
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, SPARSIFY: tl.constexpr,
    MODELS: tl.constexpr, CHUNK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Sums of a chunk's TOGETHER blocks for one model; models vary fastest, so that the base is read from memory once."""
    m = tl.program_id(0) % MODELS
    entry = table + chunks_at + 2 * (tl.program_id(0) // MODELS).to(tl.int64)
    row = table + tl.load(entry)
    start = tl.load(entry + 1)
    words = row + ROW_HEADER + ROW_MODEL * m
    n = tl.load(row)
    block = tl.arange(0, TOGETHER)
    begin = (start + block * SUM_BLOCK)[:, None]
    full = tl.zeros([TOGETHER, LANES], tl.float64)
    part = tl.zeros([TOGETHER, LANES], tl.float64)
    for step in range(0, _steps_end(n, begin), LANES):
        index = begin + step + tl.arange(0, LANES)[None, :]
        delta = _load(tl.load(words), index, n, MODEL, COMPUTE)
        if HAS_BASE:
            delta = delta - _load(tl.load(row + BASE_WORD), index, n, BASE, COMPUTE)
        magnitude = tl.abs(delta).to(tl.float64)
        full += magnitude
        if SPARSIFY == "magnitude" or SPARSIFY == "band":
            kept = kept_by_selection(magnitude_key(delta), words, 0, index, SPARSIFY == "band")
        else:
            group = ((begin + step) >> 2) + tl.arange(0, LANES // 4)[None, :]
            model = m + tl.zeros([1, 1], tl.uint32)
            kept = kept_by_chance(group, tl.load(row + 5), tl.load(row + 3), model, tl.load(words + 5), [TOGETHER, LANES])
        part += tl.where(kept, magnitude, 0.0)
    to = sums + ((2 * m.to(tl.int64)) * chunks + tl.load(row + FIRST_CHUNK_WORD) + start // CHUNK) * TOGETHER + block
    tl.store(to, _fold(full, TOGETHER))
    tl.store(to + chunks.to(tl.int64) * TOGETHER, _fold(part, TOGETHER))


@triton.jit(do_not_specialize=["chunks"])
def factor_kernel(
    table,
    places,  # int64 [tensors]: where the rows start
    sums,  # as abs_sums_kernel leaves them
    chunks,
    COMPUTE: tl.constexpr, MODELS: tl.constexpr, TOGETHER: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Adds the blocks' sums in order, a program per tensor and model, and puts the factor that restores the norm into the row."""
    m = tl.program_id(0) % MODELS
    row = table + tl.load(places + tl.program_id(0) // MODELS)
    blocks = (tl.load(row) + SUM_BLOCK - 1) // SUM_BLOCK
    at = sums + ((2 * m.to(tl.int64)) * chunks + tl.load(row + FIRST_CHUNK_WORD)) * TOGETHER
    kept_at = at + chunks.to(tl.int64) * TOGETHER
    full = tl.zeros([], tl.float64)
    part = tl.zeros([], tl.float64)
    for first in range(0, blocks, UNROLL):
        for i in tl.static_range(UNROLL):  # the loads do not wait for the sums; what is added beyond the end is +0
            inside = first + i < blocks
            full += tl.load(at + first + i, mask=inside, other=0.0)
            part += tl.load(kept_at + first + i, mask=inside, other=0.0)
    factor = tl.where(part > 0, full / tl.where(part > 0, part, 1.0), 1.0)
    if COMPUTE == tl.float64:
        bits = factor.to(tl.int64, bitcast=True)
    else:
        bits = factor.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(row + ROW_HEADER + ROW_MODEL * m + FACTOR_WORD, bits)


@triton.jit(do_not_specialize=["n"])
def dots_kernel(a, b, sums, n: tl.int64, TOGETHER: tl.constexpr):
    """sums: fp64 [3, blocks], of a * a, b * b and a * b."""
    blocks = (n + SUM_BLOCK - 1) // SUM_BLOCK
    block = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    begin = block[:, None] * SUM_BLOCK
    aa = tl.zeros([TOGETHER, LANES], tl.float64)
    bb = tl.zeros([TOGETHER, LANES], tl.float64)
    ab = tl.zeros([TOGETHER, LANES], tl.float64)
    for step in range(0, _steps_end(n, begin), LANES):
        index = begin + step + tl.arange(0, LANES)[None, :]
        x = widen(tl.load(a + index, mask=index < n, other=0.0), tl.float64)
        y = widen(tl.load(b + index, mask=index < n, other=0.0), tl.float64)
        aa += x * x
        bb += y * y
        ab += x * y
    tl.store(sums + block, _fold(aa, TOGETHER), mask=block < blocks)
    tl.store(sums + blocks + block, _fold(bb, TOGETHER), mask=block < blocks)
    tl.store(sums + 2 * blocks + block, _fold(ab, TOGETHER), mask=block < blocks)


def _in_order(sums: Tensor, before: Sequence[float]) -> Tensor:
    """fp64 [rows, blocks] to [rows]: added in order to what was before. Not the built-in sum, which corrects for rounding from Python 3.12
    on."""
    totals = []
    for row, total in zip(sums.tolist(), before, strict=True):
        for value in row:
            total += value
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)


def _blocks(n: int) -> int:
    return -(-n // SUM_BLOCK.value)


class Norms:
    """Factors that restore the L1 norm of each tensor's delta after sparsifying, left in the table's rows; `run` only launches."""

    def __init__(self, table: Table, models: int, sparsify: str) -> None:
        device = table.words.device
        self.table, self.models, self.sparsify = table, models, sparsify
        self.together = table.chunk // SUM_BLOCK.value
        self.sums = torch.empty(models * 2 * table.chunks * self.together, dtype=torch.float64, device=device)
        # Rows of one arithmetic together, a launch each.
        computes = list(dict.fromkeys(group.key[3] for group in table.groups))
        rows = [[at for at, group in zip(table.row_at, table.group_of) if group.key[3] == compute] for compute in computes]
        self.places = list(zip(computes, pack(device, *rows)))

    def run(self) -> None:
        self._add_blocks()
        words, chunks = self.table.words, self.table.chunks
        for compute, places in self.places:
            launch(
                factor_kernel, len(places) * self.models, words.device, words, places, self.sums, chunks,
                COMPUTE=compute, MODELS=self.models, TOGETHER=self.together, UNROLL=UNROLL,
            )  # fmt: skip

    def of_one(self, n: int, before: Sequence[float]) -> list[float]:
        """Of a table with one tensor, or a slice of one, of `n` elements: per model the sums of |delta| and of its kept part, on top of
        those of the slices `before`. Waits for the device."""
        self._add_blocks()
        sums = self.sums.view(2 * self.models, self.table.chunks * self.together)
        return _in_order(sums[:, : _blocks(n)], before).tolist()

    def _add_blocks(self) -> None:
        words, chunks = self.table.words, self.table.chunks
        for group in self.table.groups:
            base, model, _, compute, _ = group.key
            launch(
                abs_sums_kernel, group.chunks * self.models, words.device, words, group.chunks_at, self.sums, chunks,
                HAS_BASE=base is not None, BASE=base or model, MODEL=model, COMPUTE=compute, SPARSIFY=self.sparsify, MODELS=self.models,
                CHUNK=self.table.chunk, TOGETHER=self.together,
            )  # fmt: skip


def dots(a: Tensor, b: Tensor, before: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """See :func:`pymerge.reference.dots`."""
    blocks = _blocks(a.numel())
    sums = torch.empty((3, blocks), dtype=torch.float64, device=a.device)
    launch(dots_kernel, -(-blocks // TOGETHER), a.device, a, b, sums, a.numel(), TOGETHER=TOGETHER)
    return _in_order(sums, before)
