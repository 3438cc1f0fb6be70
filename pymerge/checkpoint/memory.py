"""How a merge is cut into jobs, and how much memory they take: tensors whole or in slices, within a budget.

Elementwise methods need no whole tensor, so large tensors are worked in slices. A method that must know something of all of a tensor first
(thresholds, norms) takes the tensor whole where that fits in the budget, because then it is read once, and else in slices, pass by pass.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..merge_methods.registry import Method
from ..merge_methods.sliced import Sliced, SlicedTensor
from ..slice_ops import ALIGNMENT, can_slice
from . import dtypes
from .available import memory_left
from .format import TensorInfo
from .ring import aligned
from .settings import is_built_in
from .sizes import format_bytes

if TYPE_CHECKING:
    from .plan import TensorPlan

__all__ = [
    "LEAST_MEMORY",
    "Buffers",
    "Group",
    "Job",
    "Piece",
    "Schedule",
    "default_memory",
    "input_pieces",
    "make_schedule",
    "size_of",
]

BATCH = 8_000_000
"""Bytes of inputs below which tensors are read together: a hand-over between threads costs as much as copying a megabyte."""

SLICE = 64 * 2**20
"""Bytes of inputs and output in a slice, at most. Larger slices make nothing faster."""

MOST_AHEAD = 192 * 2**20
"""Bytes read ahead of the merge and written behind it, at most, beyond the largest job."""

LEAST_MEMORY = 64 * 2**20
"""The smallest budget: below it slices get so short that reading them is slow."""

MOST_BY_DEFAULT = 4 * 10**9
"""The budget where none is given, at most. More makes nothing faster but methods that need whole tensors of gigabytes."""

UNIT = 1 << 16
"""Elements: slices are multiples of it where they can be, which is the core's unit of work."""


def default_memory() -> int:
    """The budget where none is given: 4 GB, or a quarter of the machine's memory or of what a container's limit leaves, if that is less."""
    there = [MOST_BY_DEFAULT * 4]
    try:
        there.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # a system that does not say
        pass
    left = memory_left()
    if left is not None:
        there.append(left)
    return max(LEAST_MEMORY, min(there) // 4)


@dataclass(frozen=True)
class Group:
    """Tensors that are merged in slices, together when what has to be known of them first is shared (ranks over the whole model)."""

    sliced: Sliced
    tensors: dict[str, TensorPlan]


@dataclass(frozen=True)
class Piece:
    """`count` elements of a tensor from `first` on.

    Attributes:
        group: that they are merged in, None for a tensor that is merged whole or copied.
        step: number of the pass, the group's number of passes when they are merged.
    """

    tensor: TensorPlan
    first: int
    count: int
    group: Group | None = None
    step: int = 0

    @property
    def merged(self) -> bool:
        """Whether a part of the output comes of it."""
        return self.group is None or self.step == self.group.sliced.passes

    @property
    def bytes_out(self) -> int:
        """Of the output."""
        return size_of(self.tensor.output.dtype, self.count) if self.merged else 0


@dataclass(frozen=True)
class Job:
    """Pieces that are read, merged and written together, and the bytes that they take in the buffers."""

    pieces: tuple[Piece, ...]
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Buffers:
    """Sizes of the two blocks of memory that tensors pass through, in bytes."""

    inputs: int
    outputs: int

    @property
    def total(self) -> int:
        """Both."""
        return self.inputs + self.outputs


@dataclass(frozen=True)
class Schedule:
    """All the work of a merge, in order.

    Attributes:
        jobs: what is done.
        buffers: memory for tensors on their way.
        bytes_read: of tensors, every pass counted.
        warnings: tensors that do not fit in the budget and cannot be merged in slices.
    """

    jobs: tuple[Job, ...]
    buffers: Buffers
    bytes_read: int
    warnings: tuple[str, ...]


def size_of(code: str, count: int) -> int:
    """Bytes of `count` elements of a dtype."""
    return -(-count * dtypes.BITS[code] // 8)


def input_pieces(piece: Piece) -> dict[tuple[int, str], tuple[TensorInfo, int, int]]:
    """(Checkpoint index, name there) -> the tensor, where the piece begins in it, and how long it is, in bytes; each input once."""
    return {
        (index, info.name): (info, size_of(info.dtype, piece.first), size_of(info.dtype, piece.count))
        for index, info in piece.tensor.inputs
    }


def make_schedule(
    tensors: Sequence[TensorPlan], method: Method, dtype: str | None, memory: int | None = None, done: Container[str] = ()
) -> Schedule:
    """Cut the merge of `tensors` into jobs that keep within a budget.

    Args:
        tensors: of the output, in order.
        method: that merges them.
        dtype: code of the dtype that inputs are cast to first, None for none.
        memory: bytes for tensors on their way and for what a method gathers; :func:`default_memory` by default. Python and torch themselves
            take about 300 MB besides.
        done: names of tensors that need not be merged any more. They are still read where the others are ranked together with them.

    Raises:
        ValueError: `memory` is less than LEAST_MEMORY, or the backend merges whole tensors only and ranks over the whole model are wanted.
    """
    memory = default_memory() if memory is None else memory
    if memory < LEAST_MEMORY:
        raise ValueError(f"a memory budget of {format_bytes(memory)} is too small; it must be at least {format_bytes(LEAST_MEMORY)}")
    cutter = _Cutter(method, dtype, memory)
    pieces = list(cutter.pieces(tensors, done))
    jobs = _jobs(pieces, min(BATCH, memory // 8))
    largest_in = max((job.bytes_in for job in jobs), default=0)
    largest_out = max((job.bytes_out for job in jobs), default=0)
    ahead = max(0, min(MOST_AHEAD, memory - memory // 4 - largest_in - largest_out))
    buffers = Buffers(largest_in + min(max(largest_in, BATCH), ahead * 2 // 3), largest_out + min(max(largest_out, BATCH), ahead // 3))
    read = sum(count for piece in pieces for _, _, count in input_pieces(piece).values())
    return Schedule(tuple(jobs), buffers, read, tuple(cutter.warnings))


def _jobs(pieces: Iterable[Piece], batch_size: int) -> list[Job]:
    """Neighbouring pieces in batches of at most `batch_size` bytes of inputs, or one larger piece."""
    jobs: list[Job] = []
    batch: list[Piece] = []
    bytes_in = bytes_out = 0
    for piece in pieces:
        own_in = sum(aligned(count) for _, _, count in input_pieces(piece).values())
        if batch and bytes_in + own_in > batch_size:
            jobs.append(Job(tuple(batch), bytes_in, bytes_out))
            batch, bytes_in, bytes_out = [], 0, 0
        batch.append(piece)
        bytes_in += own_in
        bytes_out += aligned(piece.bytes_out)
    if batch:
        jobs.append(Job(tuple(batch), bytes_in, bytes_out))
    return jobs


class _Cutter:
    """Decides for every tensor whether it is worked whole or in slices."""

    def __init__(self, method: Method, dtype: str | None, memory: int) -> None:
        self._method = method
        self._dtype = dtype
        self._gathered = memory // 8  # for what a method gathers in a pass
        self._whole = memory - memory // 4
        self._slice = min(SLICE, memory // 8)
        self._slices = can_slice(torch.device("cpu"))
        self.warnings: list[str] = []

    def pieces(self, tensors: Sequence[TensorPlan], done: Container[str]) -> Iterable[Piece]:
        together = [t for t in tensors if self._over_the_model(t)]
        group = self._group(together) if together else None
        passed = False
        for tensor in tensors:
            if tensor.output.name in done:
                continue
            if group is not None and tensor.output.name in group.tensors:
                if not passed:
                    passed = True
                    for step in range(group.sliced.passes):
                        for one in together:
                            yield from self._cut(one, group, step)
                yield from self._cut(tensor, group, group.sliced.passes)
            else:
                yield from self._alone(tensor)

    def _over_the_model(self, tensor: TensorPlan) -> bool:
        method = self._method
        if tensor.copied or method.whole_model is None or method.whole_model(**tensor.parameters) is None:
            return False
        if not self._slices:
            raise ValueError('ranks over the whole model (scope "model") need the native or the reference backend')
        return True

    def _group(self, tensors: Sequence[TensorPlan]) -> Group:
        described = [
            SlicedTensor(t.output.name, t.output.shape, any(self._code(info) == "F64" for _, info in t.inputs), t.parameters)
            for t in tensors
        ]
        return Group(self._method.sliced(described, self._gathered), {t.output.name: t for t in tensors})

    def _alone(self, tensor: TensorPlan) -> Iterable[Piece]:
        whole = Piece(tensor, 0, _numel(tensor))
        nbytes = whole.bytes_out + sum(count for _, _, count in input_pieces(whole).values())
        if nbytes <= self._slice:
            return [whole]
        if tensor.copied:
            return self._cut(tensor, None, 0)
        if self._slices and self._method.sliced is not None:
            group = self._group([tensor])
            passes = group.sliced.passes
            if not passes or nbytes + self._scratch(tensor, passes) > self._whole:
                return [piece for step in range(passes + 1) for piece in self._cut(tensor, group, step)]
        elif nbytes + self._scratch(tensor, 0) > self._whole:
            self.warnings.append(
                f"{tensor.output.name!r} takes {format_bytes(nbytes)}, more than the memory budget allows, and {self._method.name!r} needs "
                "the whole tensor"
            )
        return [whole]

    def _code(self, info: TensorInfo) -> str:
        """The dtype that an input has when the method gets it."""
        if self._dtype is None or (self._dtype == "F32" and info.dtype in ("BF16", "F16") and is_built_in(self._method)):
            return info.dtype
        return self._dtype

    def _scratch(self, tensor: TensorPlan, passes: int) -> int:
        """Memory that merging the whole tensor takes besides its buffers: casts, and the core's lists of candidates for a threshold."""
        count = _numel(tensor)
        cast = [self._code(info) for _, info in tensor.inputs if self._code(info) != info.dtype]
        fp8 = sum(info.dtype.startswith("F8") for _, info in tensor.inputs)
        return sum(size_of(code, count) for code in cast) + 4 * count * fp8 + (count * len(tensor.inputs) // 2 if passes else 0)

    def _cut(self, tensor: TensorPlan, group: Group | None, step: int) -> Iterable[Piece]:
        size = _numel(tensor)
        bits = dtypes.BITS[tensor.output.dtype] + sum(dtypes.BITS[info.dtype] for _, info in tensor.inputs)
        count = self._slice * 8 // bits
        count = max(ALIGNMENT, count // UNIT * UNIT or count // ALIGNMENT * ALIGNMENT)
        return [Piece(tensor, first, min(count, size - first), group, step) for first in range(0, max(size, 1), count)]


def _numel(tensor: TensorPlan) -> int:
    return math.prod(tensor.output.shape)
