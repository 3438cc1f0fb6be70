"""How tensors are grouped into jobs, and how much memory their way through the merge takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .ring import aligned

if TYPE_CHECKING:
    from .plan import TensorPlan

__all__ = ["Buffers", "Job", "buffers_for", "input_pieces", "make_jobs"]

BATCH = 8_000_000
"""Bytes of inputs below which tensors are read together: a hand-over between threads costs as much as copying a megabyte."""

MOST_AHEAD_IN, MOST_AHEAD_OUT = 128 * 2**20, 64 * 2**20
"""Bytes read ahead of the merge and written behind it, at most, beyond the largest job."""


@dataclass(frozen=True)
class Job:
    """Tensors that are read, merged and written together, and the bytes of all their inputs and outputs."""

    tensors: tuple[TensorPlan, ...]
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


def input_pieces(tensor: TensorPlan) -> dict[tuple[int, str], int]:
    """(Checkpoint index, name there) -> aligned bytes; what is an input twice is read once."""
    return {(index, info.name): aligned(info.nbytes) for index, info in tensor.inputs}


def make_jobs(tensors: Sequence[TensorPlan]) -> list[Job]:
    """Neighbouring tensors in batches of at most :data:`BATCH` bytes of inputs, or one larger tensor."""
    jobs: list[Job] = []
    batch: list[TensorPlan] = []
    bytes_in = bytes_out = 0
    for tensor in tensors:
        own_in = sum(input_pieces(tensor).values())
        if batch and bytes_in + own_in > BATCH:
            jobs.append(Job(tuple(batch), bytes_in, bytes_out))
            batch, bytes_in, bytes_out = [], 0, 0
        batch.append(tensor)
        bytes_in += own_in
        bytes_out += aligned(tensor.output.nbytes)
    if batch:
        jobs.append(Job(tuple(batch), bytes_in, bytes_out))
    return jobs


def buffers_for(tensors: Sequence[TensorPlan]) -> Buffers:
    """Room for the largest job and for as much again, but not more than a little, on the way."""
    jobs = make_jobs(tensors)
    largest_in = max((job.bytes_in for job in jobs), default=0)
    largest_out = max((job.bytes_out for job in jobs), default=0)
    return Buffers(largest_in + min(max(largest_in, BATCH), MOST_AHEAD_IN), largest_out + min(max(largest_out, BATCH), MOST_AHEAD_OUT))
