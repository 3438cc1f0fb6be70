"""About how long a merge will take: a small part of it is done, without writing anything, and the rest is put in proportion."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .device import Device
from .many import PlannedMerge
from .memory import Schedule, make_schedule
from .merger import TensorMerger
from .meter import Meter
from .pipeline import run
from .plan import Plan, TensorPlan

__all__ = ["SAMPLE", "WRITE_RATE", "Estimate", "estimate"]

SAMPLE = 128_000_000
"""Bytes that are read and merged to see how fast that goes: some tenths of a second, where the disk is not very slow."""

WRITE_RATE = 500_000_000
"""Bytes per second that are assumed for writing, which cannot be measured without writing: those of a SATA SSD."""


@dataclass(frozen=True)
class Estimate:
    """What merges will take.

    Attributes:
        seconds: in all; None when nothing could be measured.
        bytes_read, bytes_written: of tensors.
        passes: how often the tensors are read that are read most often.
        sampled: bytes that were read to measure the rates.
        read_rate, merge_rate: measured, in bytes per second; what is in the page cache now is read from there. Merging counts what it reads
            and what it writes. None when nothing could be measured.
        write_rate: assumed.
    """

    seconds: float | None
    bytes_read: int
    bytes_written: int
    passes: int
    sampled: int
    read_rate: float | None
    merge_rate: float | None
    write_rate: float


def estimate(
    merges: Sequence[PlannedMerge], memory: int | None = None, write_rate: float = WRITE_RATE, device: Device | None = None
) -> Estimate:
    """Estimate how long merges will take, one after the other. Reads and merges up to :data:`SAMPLE` bytes of them; writes nothing.

    Reading and writing are taken to share a disk and merging to go on beside them, so the time is that of reading and writing, or of
    merging where that takes longer.

    Args:
        merges: what is to be done. Those that use results which are not there yet add to the work and not to the sample.
        memory: budget, see :func:`pymerge.merge`.
        write_rate: bytes per second to assume.
        device: that merges, None for the CPU.

    Raises:
        CheckpointError, MergeError: a part of the sample cannot be read or merged.
        ValueError: the budget is too small.
    """
    meter = Meter()
    schedules = [merge.plan.schedule(memory, device=device) for merge in merges]
    ready = [merge.plan for merge in merges if merge.ready]
    for plan in ready:
        _sample(plan, memory, SAMPLE // len(ready), meter, device)
    read = sum(schedule.bytes_read for schedule in schedules)
    written = sum(merge.plan.bytes_written for merge in merges)
    read_rate, merge_rate = meter.rate("reading"), meter.rate("merging")
    seconds = max(read / read_rate + written / write_rate, (read + written) / merge_rate) if read_rate and merge_rate else None
    return Estimate(
        seconds=seconds,
        bytes_read=read,
        bytes_written=written,
        passes=max(map(_passes, schedules), default=0),
        sampled=meter.bytes["reading"],
        read_rate=read_rate or None,
        merge_rate=merge_rate or None,
        write_rate=write_rate,
    )


def _passes(schedule: Schedule) -> int:
    return max((1 + (piece.group.sliced.passes if piece.group else 0) for job in schedule.jobs for piece in job.pieces), default=0)


def _sample(plan: Plan, memory: int | None, nbytes: int, meter: Meter, device: Device | None) -> None:
    """Merge some tensors of a plan, at random so that a second estimate does not find them all in the page cache."""

    def size(tensor: TensorPlan) -> int:
        return tensor.output.nbytes + sum(info.nbytes for _, info in tensor.inputs)

    chosen: list[TensorPlan] = []
    left = nbytes
    # The rate of tiny tensors says nothing about that of large ones, and the largest may be too much for a sample.
    for tensor in sorted(plan.tensors, key=lambda t: (-min(size(t), nbytes // 8), random.random())):
        if not tensor.copied and size(tensor) <= left:
            chosen.append(tensor)
            left -= size(tensor)
    if not chosen:
        chosen = sorted((t for t in plan.tensors if not t.copied), key=size)[:1]
    merger = TensorMerger(dataclasses.replace(plan, tensors=tuple(chosen)), check_finite=False)
    schedule = make_schedule(chosen, plan.method, plan.recipe.dtype, memory, device=device)
    run(schedule, plan.checkpoints, _Nowhere(), merger, min(4, os.cpu_count() or 1), None, meter)


class _Nowhere:
    """Takes what a merge gives and forgets it."""

    def write(self, name: str, data: memoryview, start: int = 0) -> None:
        """Nothing."""
