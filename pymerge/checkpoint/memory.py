"""How a merge is cut into jobs, and how much memory they take: tensors whole or in slices, within a budget.

Elementwise methods need no whole tensor, so large tensors are worked in slices. A method that must know something of all of a tensor first
(thresholds, norms) takes the tensor whole where that fits in the budget, because then it is read once, and else in slices, pass by pass.
Where a device merges, a job has to fit in the host's budget and in the device's.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..merge_methods.registry import Method
from ..merge_methods.sliced import Sliced, SlicedTensor
from ..slice_ops import ALIGNMENT
from . import dtypes
from .budget import LEAST_MEMORY, default_memory
from .device import Device
from .format import TensorInfo
from .ring import aligned
from .settings import is_built_in
from .sizes import format_bytes

if TYPE_CHECKING:
    from .plan import TensorPlan

__all__ = [
    "Buffers",
    "Group",
    "Job",
    "Piece",
    "Schedule",
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

UNIT = 1 << 16
"""Elements: slices are multiples of it where they can be, which is the core's unit of work."""


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
        device: that merges, None for the CPU.
        device_buffers: its memory for tensors on their way.
    """

    jobs: tuple[Job, ...]
    buffers: Buffers
    bytes_read: int
    warnings: tuple[str, ...]
    device: Device | None = None
    device_buffers: Buffers = Buffers(0, 0)


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
    tensors: Sequence[TensorPlan],
    method: Method,
    dtype: str | None,
    memory: int | None = None,
    done: Container[str] = (),
    device: Device | None = None,
) -> Schedule:
    """Cut the merge of `tensors` into jobs that keep within a budget.

    Args:
        tensors: of the output, in order.
        method: that merges them.
        dtype: code of the dtype that inputs are cast to first, None for none.
        memory: bytes for tensors on their way and for what a method gathers; :func:`default_memory` by default. Python and torch themselves
            take about 300 MB besides.
        done: names of tensors that need not be merged any more. They are still read where the others are ranked together with them.
        device: that merges, with its own budget for what is said of `memory`; None for the CPU.

    Raises:
        ValueError: a budget is less than LEAST_MEMORY; the method cannot be merged on the device.
    """
    memory = default_memory() if memory is None else memory
    for budget, what in ((memory, "memory"), (memory if device is None else device.memory, "device memory")):
        if budget < LEAST_MEMORY:
            raise ValueError(f"a {what} budget of {format_bytes(budget)} is too small; it must be at least {format_bytes(LEAST_MEMORY)}")
    if device is not None and method.cpu_only:
        raise ValueError(f"{method.name!r} is merged on the CPU only: {method.cpu_only}; leave --device (device=) out")
    cutter = _Cutter(method, dtype, memory, device)
    pieces = list(cutter.pieces(tensors, done))
    jobs = _jobs(pieces, min(BATCH, cutter.budget // 8))
    read = sum(count for piece in pieces for _, _, count in input_pieces(piece).values())
    on_device = Buffers(0, 0) if device is None else _buffers(jobs, device.memory - cutter.scratch)
    return Schedule(tuple(jobs), _buffers(jobs, memory), read, tuple(cutter.warnings), device, on_device)


def _buffers(jobs: Sequence[Job], memory: int) -> Buffers:
    """Room for the largest job, and for others before and after it as far as the budget allows."""
    largest_in = max((job.bytes_in for job in jobs), default=0)
    largest_out = max((job.bytes_out for job in jobs), default=0)
    ahead = max(0, min(MOST_AHEAD, memory - memory // 4 - largest_in - largest_out))
    return Buffers(largest_in + min(max(largest_in, BATCH), ahead * 2 // 3), largest_out + min(max(largest_out, BATCH), ahead // 3))


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
    """Decides for every tensor whether it is worked whole or in slices.

    Attributes:
        budget: bytes that the work has where it has least.
        scratch: most that a tensor needs besides its buffers when it is merged whole.
    """

    def __init__(self, method: Method, dtype: str | None, memory: int, device: Device | None) -> None:
        self._method = method
        self._dtype = dtype
        self._device = device
        self._memory = memory
        self.budget = memory if device is None else min(memory, device.memory)
        self._gathered = (memory if device is None else device.memory) // 8  # for what a method gathers in a pass
        self._slice = min(SLICE, self.budget // 8)
        self.scratch = 0
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
        return not tensor.copied and method.whole_model is not None and method.whole_model(**tensor.parameters) is not None

    def _group(self, tensors: Sequence[TensorPlan]) -> Group:
        where = torch.device("cpu") if self._device is None else self._device.device
        described = [
            SlicedTensor(t.output.name, t.output.shape, any(self._code(info) == "F64" for _, info in t.inputs), t.parameters, where)
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
        if self._method.sliced is not None:
            group = self._group([tensor])
            passes = group.sliced.passes
            if not passes or self._lacks_memory(tensor, nbytes, passes):
                return [piece for step in range(passes + 1) for piece in self._cut(tensor, group, step)]
        elif lacking := self._lacks_memory(tensor, nbytes, 0):
            self.warnings.append(
                f"{tensor.output.name!r} takes {format_bytes(nbytes)}, more than the {lacking} budget allows, and {self._method.name!r} "
                "needs the whole tensor"
            )
        return [whole]

    def _lacks_memory(self, tensor: TensorPlan, nbytes: int, passes: int) -> str:
        """Which budget does not allow a tensor to be merged whole, if one does not. What is merged on a device takes no more than its
        buffers on the host."""
        scratch = self._scratch(tensor, passes)
        lacking = ""
        if self._device is not None and nbytes + scratch > self._device.memory - self._device.memory // 4:
            lacking = "device memory"
        elif nbytes + (0 if self._device else scratch) > self._memory - self._memory // 4:
            lacking = "memory"
        if not lacking:
            self.scratch = max(self.scratch, scratch)
        return lacking

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
        if self._device is None:
            return sum(size_of(code, count) for code in cast) + 4 * count * fp8 + (count * len(tensor.inputs) // 2 if passes else 0)
        # Models of several dtypes are widened, a result in fp8 is rounded from fp32, selections have room for more candidates, and methods
        # that know no slices keep masks of the models and a number per element.
        wide = 4 * count * (len(tensor.inputs) if len({info.dtype for _, info in tensor.inputs}) > 1 else 0)
        wide += 4 * count * tensor.output.dtype.startswith("F8")
        own = 2 * count * len(tensor.inputs) if passes else count * (4 + len(tensor.inputs)) if self._method.sliced is None else 0
        return sum(size_of(code, count) for code in cast) + 4 * count * fp8 + wide + own

    def _cut(self, tensor: TensorPlan, group: Group | None, step: int) -> Iterable[Piece]:
        size = _numel(tensor)
        bits = dtypes.BITS[tensor.output.dtype] + sum(dtypes.BITS[info.dtype] for _, info in tensor.inputs)
        count = self._slice * 8 // bits
        count = max(ALIGNMENT, count // UNIT * UNIT or count // ALIGNMENT * ALIGNMENT)
        return [Piece(tensor, first, min(count, size - first), group, step) for first in range(0, max(size, 1), count)]


def _numel(tensor: TensorPlan) -> int:
    return math.prod(tensor.output.shape)
