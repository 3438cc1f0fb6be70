"""Whole-tensor sums in fp64 in the one order that every backend uses (docs/arithmetic.md): blocks of 4096, 64 lanes each.

A kernel gives the sums of blocks; they are added in order on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine import ROW_HEADER, ROW_MODEL
from .launch import launch
from .memory import widen
from .sparsify import kept_by_chance, kept_by_magnitude, magnitude_key

__all__ = ["abs_sums", "abs_sums_kernel", "dots", "dots_kernel"]

LANES = tl.constexpr(64)
SUM_BLOCK = tl.constexpr(4096)
TOGETHER = 8  # blocks of one program, so that a row of lanes fills its warps


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


@triton.jit
def abs_sums_kernel(
    row,  # int64, a row of combine.py
    sums,  # fp64 [models, 2, blocks]: of |delta| and of its kept part
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, COMPUTE: tl.constexpr, SPARSIFY: tl.constexpr,
    MODELS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Sums of TOGETHER blocks of one model; models vary fastest, so that the base is read from memory once."""
    m = tl.program_id(0) % MODELS
    words = row + ROW_HEADER + ROW_MODEL * m
    n = tl.load(row)
    blocks = (n + SUM_BLOCK - 1) // SUM_BLOCK
    block = (tl.program_id(0) // MODELS).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    begin = block[:, None] * SUM_BLOCK
    full = tl.zeros([TOGETHER, LANES], tl.float64)
    part = tl.zeros([TOGETHER, LANES], tl.float64)
    for step in range(0, _steps_end(n, begin), LANES):
        index = begin + step + tl.arange(0, LANES)[None, :]
        delta = _load(tl.load(words), index, n, MODEL, COMPUTE)
        if HAS_BASE:
            delta = delta - _load(tl.load(row + 1), index, n, BASE, COMPUTE)
        magnitude = tl.abs(delta).to(tl.float64)
        full += magnitude
        if SPARSIFY == "magnitude" or SPARSIFY == "band":
            key = magnitude_key(delta)
            kept = kept_by_magnitude(key, tl.load(words + 3), tl.load(words + 4), 0, index)
            if SPARSIFY == "band":
                kept = kept & ~kept_by_magnitude(key, tl.load(words + 6), tl.load(words + 7), 0, index)
        else:
            group = ((begin + step) >> 2) + tl.arange(0, LANES // 4)[None, :]
            model = m + tl.zeros([1, 1], tl.uint32)
            kept = kept_by_chance(group, tl.load(row + 5), tl.load(row + 3), model, tl.load(words + 5), [TOGETHER, LANES])
        part += tl.where(kept, magnitude, 0.0)
    to = sums + 2 * m * blocks + block
    tl.store(to, _fold(full, TOGETHER), mask=block < blocks)
    tl.store(to + blocks, _fold(part, TOGETHER), mask=block < blocks)


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


def _in_order(sums: Tensor) -> Tensor:
    """fp64 [rows, blocks] to [rows]: added in order from +0. Not the built-in sum, which corrects for rounding from Python 3.12 on."""
    totals = []
    for row in sums.tolist():
        total = 0.0
        for value in row:
            total += value
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)


def _blocks(n: int) -> int:
    return -(-n // SUM_BLOCK.value)


def abs_sums(row: Tensor, n: int, models: int, base, model, compute, sparsify: str) -> list[tuple[float, float]]:
    """Per model the L1 norms of its delta and of the delta's kept part, for one row of combine's table; Triton's dtypes."""
    blocks = _blocks(n)
    sums = torch.empty((models * 2, blocks), dtype=torch.float64, device=row.device)
    launch(
        abs_sums_kernel, -(-blocks // TOGETHER) * models, row.device, row, sums,
        HAS_BASE=base is not None, BASE=base or model, MODEL=model, COMPUTE=compute, SPARSIFY=sparsify, MODELS=models, TOGETHER=TOGETHER,
    )  # fmt: skip
    return [(full, part) for full, part in _in_order(sums).reshape(models, 2).tolist()]


def dots(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`pymerge.reference.dots`."""
    blocks = _blocks(a.numel())
    sums = torch.empty((3, blocks), dtype=torch.float64, device=a.device)
    launch(dots_kernel, -(-blocks // TOGETHER), a.device, a, b, sums, a.numel(), TOGETHER=TOGETHER)
    return _in_order(sums)
