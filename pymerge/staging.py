"""Tensors in CPU memory merged on a GPU: copied in, merged and copied out in batches, all three at once.

On the device a batch is two pieces of memory: its inputs one after the other, and its results. Bytes go there and back through pinned
blocks of the host, each window of a batch in one copy, however many tensors lie in it. Where every element of a result depends on the
same element of the inputs alone, tensors are cut into slices; else a batch is of whole tensors.

There are two batches' memory on the device (one where two do not fit), two pinned blocks per direction, and a stream each for copies in,
for kernels and for copies out. Nothing is overwritten before the event that ends its last use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from . import many_ops
from .finite import raise_if_not_finite
from .many_ops import Job
from .spec import MergeSpec
from .staging_batches import Batch, batches, bytes_of, inputs_of, typed
from .staging_streams import Blocks, free_bytes, make_streams, usable
from .tree import Paired

__all__ = ["lerp_staged", "merge_staged"]

BLOCK = 2**24  # bytes of a pinned block: long enough for full speed, short enough that the first copy starts soon

Launch = Callable[[list[Job]], object]  # the merge into the jobs' `out`, without waiting; its value is false where a delta is not finite


def merge_staged(pairs: Paired, spec: MergeSpec, device: torch.device | str, *, dtype, out, check_finite: bool):
    """`spec` applied to every tensor, on `device`; `pairs` and the result are in CPU memory. Arguments as `fused.merge_models` has them.

    Raises:
        ValueError: a tensor is not in CPU memory; `device` is not there; a tensor, or all of them where they are ranked together, does not
            fit on it.
    """
    majority = spec.elect and spec.convention.zero_vote == "majority"
    together = spec.convention.scope == "model" and pairs.kind != "tensor"
    sliced = spec.sparsify == "none" and not majority and not together
    return _staged(
        pairs, lambda jobs: many_ops.launch_merges(jobs, spec), device, sliced=sliced, together=together, dtype=dtype, out=out,
        labels=None if check_finite else (),
    )  # fmt: skip


def lerp_staged(
    pairs: Paired, alpha: float, device: torch.device | str, *, dtype, out, labels: tuple[str, str], check_finite: bool
):  # fmt: skip
    """The interpolation from base to model, on `device`; else as :func:`merge_staged`."""
    return _staged(
        pairs, lambda jobs: many_ops.launch_lerps(jobs, alpha), device, sliced=True, together=False, dtype=dtype, out=out,
        labels=labels if check_finite else (),
    )  # fmt: skip


def _staged(pairs: Paired, launch: Launch, device, *, sliced: bool, together: bool, dtype, out, labels):
    """`labels`: what base and models are called where they are not finite; None for the usual names, empty for no check."""
    device = usable(device)
    for name in pairs.merged:
        where = pairs.facts[0][name].device
        if where.type != "cpu":
            raise ValueError(f"device= takes tensors from CPU memory to {device}; {name!r} is on {where}: leave device out for those")

    def merge(jobs: Sequence[Job]) -> list[Tensor]:
        results = [job.target() for job in jobs]
        finite = _Pipeline(jobs, results, launch, device, sliced, together).run()
        if labels != () and not finite:  # a delta overflowed or an input is not finite: only the latter is an error
            for job in jobs:
                names = labels or ("base", *(f"model {i}" for i in range(len(job.models))))
                raise_if_not_finite(zip(names, (job.base, *job.models)), job.name)
        return results

    return pairs.result_of_many(merge, lambda where: math.inf, dtype=dtype, out=out)


# ------------------------------------------------------------------------------------------------------------------------------------------
# Pipeline


@dataclass
class _Slot:
    """Memory of a batch on the device, and the events after which its inputs and its results may be overwritten.

    Inputs and results are apart, so that the next inputs can come while the results, which lie elsewhere in another batch, still leave.
    """

    inputs: Tensor
    results: Tensor
    computed: object = None
    stored: object = None


class _Pipeline:
    def __init__(
        self, jobs: Sequence[Job], results: Sequence[Tensor], launch: Launch, device: torch.device, sliced: bool, together: bool
    ) -> None:  # fmt: skip
        self._jobs, self._results, self._launch, self._device = jobs, results, launch, device
        self._batches = list(batches(jobs, sliced, together))
        # Results that are not contiguous are put together in a contiguous copy first.
        self._flat_results = [(t if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype)).detach().view(-1) for t in results]
        self._flat_inputs: tuple[int, list[Tensor]] = (-1, [])
        self._finite: list[object] = []

    def run(self) -> bool:
        """Merge; false where a delta was not finite."""
        if not self._batches:
            return True
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            self._copy_in, self._compute, self._copy_out = streams = make_streams(self._device)
            try:
                self._run(self._slots())
                finite = all(map(bool, self._finite))
            finally:
                # Also after an error: memory goes back when this returns, and copies may still be under way.
                for stream in streams:
                    stream.synchronize()
        for result, flat in zip(self._results, self._flat_results):
            if not result.is_contiguous():
                result.copy_(flat.view(result.shape))
        return finite

    def _slots(self) -> list[_Slot]:
        sizes = [max(batch.input_bytes for batch in self._batches), max(batch.result_bytes for batch in self._batches)]
        free = free_bytes(self._device)
        if free is not None and sum(sizes) > free:
            raise ValueError(self._too_large(max(self._batches, key=lambda batch: batch.input_bytes), f"{free} bytes are free"))
        count = 2 if len(self._batches) > 1 and (free is None or 2 * sum(sizes) <= free) else 1
        slots = [_Slot(*(self._compute.allocate(size, self._device) for size in sizes)) for _ in range(count)]
        # What had this memory before may still be under way on the stream it is allocated on, and on no other.
        self._copy_in.wait_event(self._compute.record_event())
        return slots

    def _too_large(self, batch: Batch, room: str) -> str:
        size = batch.input_bytes + batch.result_bytes
        names = [self._jobs[piece.job].name for piece in batch.pieces]
        what = repr(names[0]) if len(set(names)) == 1 else f"a batch of {len(names)} tensors from {names[0]!r} on"
        return f"{what}: inputs and result take {size} bytes on {self._device}, where {room}; leave device out to merge on the CPU"

    def _run(self, slots: list[_Slot]) -> None:
        self._outgoing, self._incoming = (
            Blocks(min(BLOCK, memory.numel()), self._device) for memory in (slots[0].inputs, slots[0].results)
        )
        unsaved: tuple[_Slot, Batch] | None = None
        for number, batch in enumerate(self._batches):
            slot = slots[number % len(slots)]
            self._load(slot, batch)
            if unsaved and unsaved[0] is slot:
                self._store(*unsaved)
                unsaved = None
            self._merge(slot, batch)
            # Only now, when the device has work: room for the results may have to be waited for.
            if unsaved:
                self._store(*unsaved)
            unsaved = slot, batch
        self._store(*unsaved)
        self._incoming.drain()

    def _load(self, slot: _Slot, batch: Batch) -> None:
        if slot.computed is not None:
            self._copy_in.wait_event(slot.computed)
        parts = self._parts(batch)
        part = next(parts, None)
        for low in range(0, batch.input_bytes, BLOCK):
            high = min(low + BLOCK, batch.input_bytes)
            block = self._outgoing.next()
            while part is not None:
                at, source = part
                first, last = max(low, at), min(high, at + source.numel())
                if first < last:
                    block[first - low : last - low].copy_(source[first - at : last - at])
                if at + source.numel() > high:
                    break
                part = next(parts, None)
            to, source = slot.inputs[low:high], block[: high - low]
            self._copy_in.run(lambda to=to, source=source: to.copy_(source, non_blocking=True))
            self._outgoing.until(self._copy_in.record_event().synchronize)

    def _parts(self, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """The batch's inputs as bytes, in the order of their places."""
        for piece in batch.pieces:
            if self._flat_inputs[0] != piece.job:  # slices follow each other: a contiguous copy, if one is needed, is made once
                self._flat_inputs = piece.job, [t.detach().contiguous().view(-1) for t in inputs_of(self._jobs[piece.job])]
            for at, flat in zip(piece.inputs, self._flat_inputs[1]):
                yield at, bytes_of(flat, piece.start, piece.stop)

    def _merge(self, slot: _Slot, batch: Batch) -> None:
        self._compute.wait_event(self._copy_in.record_event())
        if slot.stored is not None:
            self._compute.wait_event(slot.stored)
        jobs = []
        for piece in batch.pieces:
            job, n = self._jobs[piece.job], piece.stop - piece.start

            inputs = [typed(slot.inputs, at, n, t.dtype) for at, t in zip(piece.inputs, inputs_of(job))]
            base = None if job.base is None else inputs.pop(0)
            jobs.append(Job(job.name, base, inputs, job.dtype, typed(slot.results, piece.output, n, job.dtype)))

        def launch() -> None:
            try:
                self._finite.append(self._launch(jobs))
            except torch.OutOfMemoryError as error:
                raise ValueError(self._too_large(batch, "the rest does not hold the side buffers of the merge")) from error

        self._compute.run(launch)
        slot.computed = self._compute.record_event()

    def _store(self, slot: _Slot, batch: Batch) -> None:
        self._copy_out.wait_event(slot.computed)
        for low in range(0, batch.result_bytes, BLOCK):
            high = min(low + BLOCK, batch.result_bytes)
            block = self._incoming.next()[: high - low]
            source = slot.results[low:high]
            self._copy_out.run(lambda to=block, source=source: to.copy_(source, non_blocking=True))
            copied = self._copy_out.record_event()

            def end(block: Tensor = block, low: int = low, high: int = high, copied=copied) -> None:
                copied.synchronize()
                for piece in batch.pieces:
                    to = bytes_of(self._flat_results[piece.job], piece.start, piece.stop)
                    first, last = max(low, piece.output), min(high, piece.output + to.numel())
                    if first < last:
                        to[first - piece.output : last - piece.output].copy_(block[first - low : last - low])

            self._incoming.until(end)
        slot.stored = self._copy_out.record_event()
