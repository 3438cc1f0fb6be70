"""Reading, merging and writing at the same time: one thread each, with bounded memory between them.

On a device (:mod:`pymerge.checkpoint.device`) two more threads copy to it and back.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .device import Route, route
from .memory import Job, Piece, Schedule, input_pieces, size_of
from .meter import STAGES, Meter
from .ring import Ring, Stopped, aligned
from .store import TensorStore
from .writer import CheckpointWriter

__all__ = ["PieceMerger", "Starts", "run"]

CHUNK = 16 * 2**20
"""Bytes per read: reads of one tensor are spread over the threads, and a stop is noticed between two of them."""

Starts = dict[tuple[int, str], int]
"""(Checkpoint index, tensor's name there) -> where its bytes begin among those of its job."""


class PieceMerger(Protocol):
    """The step between reading and writing. It runs in one thread, piece after piece in the schedule's order."""

    def merge(self, piece: Piece, source: Tensor, starts: Starts, target: Tensor) -> None:
        """Merge a piece, or gather from it what its pass is for.

        Args:
            piece: whose inputs have been read.
            source: the bytes of its job's inputs.
            starts: where its own begin there.
            target: as many bytes as it gives, of any values.
        """


@dataclass(frozen=True)
class _Read:
    """A job whose inputs are in a ring, from `position` on; per piece, where its own begin among them."""

    job: Job
    starts: list[Starts]
    position: int


@dataclass(frozen=True)
class _Merged:
    """A job's results in a ring, from `position` on: (tensor, where its bytes begin there, how many, where they belong in the tensor)."""

    results: list[tuple[str, int, int, int]]
    position: int
    nbytes: int


class _Workers:
    """The threads beside the main one. The first error of any stops all and is kept for the main thread to raise.

    Attributes:
        read, to_write: jobs in the host's memory, from the thread that reads and to the one that writes.
        to_merge, merged: jobs where they are merged; the same queues, if that is in the host's memory.
    """

    def __init__(self, rings: Sequence[Ring], device: bool) -> None:
        self.error: BaseException | None = None
        self.read: queue.SimpleQueue = queue.SimpleQueue()
        self.to_write: queue.SimpleQueue = queue.SimpleQueue()
        self.to_merge: queue.SimpleQueue = queue.SimpleQueue() if device else self.read
        self.merged: queue.SimpleQueue = queue.SimpleQueue() if device else self.to_write
        self.stopping = threading.Event()
        self._rings = rings
        self._threads: list[threading.Thread] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:
                if self.error is None:
                    self.error = error
                self.stop()

        thread = threading.Thread(target=guarded, name=f"pymerge-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        self.stopping.set()
        for ring in self._rings:
            ring.stop()
        for jobs in (self.read, self.to_merge, self.merged, self.to_write):
            jobs.put(None)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def run(
    schedule: Schedule,
    stores: Sequence[TensorStore],
    writer: CheckpointWriter,
    merger: PieceMerger,
    threads: int,
    progress: Callable[[int], None] | None,
    meter: Meter | None = None,
) -> None:
    """Carry out a schedule.

    Args:
        schedule: what to do.
        stores: that the pieces' inputs index.
        writer: entered already.
        merger: called in this thread.
        threads: that read.
        progress: called in this thread with the bytes (read and written) of each job that was merged.
        meter: told what each stage does.

    Raises:
        whatever reading, merging or writing raised first. All threads have ended when this returns or raises.
    """
    meter = meter or Meter()
    inputs, outputs = Ring(schedule.buffers.inputs), Ring(schedule.buffers.outputs)
    device = schedule.device
    with nullcontext() if device is None else route(device, schedule.device_buffers, (inputs, outputs)) as way:
        merged_from, merged_to = (inputs, outputs) if way is None else (way.inputs, way.outputs)
        workers = _Workers((inputs, outputs) if way is None else (inputs, outputs, way.inputs, way.outputs), device is not None)
        try:
            workers.start("reader", lambda: _read(stores, schedule.jobs, inputs, workers, threads, meter))
            workers.start("writer", lambda: _write(writer, outputs, workers, meter))
            if way is not None:
                meter.stages = STAGES
                workers.start("uploader", lambda: _upload(way, inputs, workers, meter))
                workers.start("downloader", lambda: _download(way, outputs, workers, meter))
            for _ in schedule.jobs:
                _merge(merger, merged_from, merged_to, workers, meter, way, progress)
            workers.merged.put(None)
            workers.join()
        except Stopped:
            pass
        finally:
            workers.stop()
            workers.join()
    if workers.error is not None:
        raise workers.error


def _merge(merger: PieceMerger, inputs: Ring, outputs: Ring, workers: _Workers, meter: Meter, way: Route | None, progress) -> None:
    """The next job."""
    read: _Read | None = workers.to_merge.get()
    if read is None:
        raise Stopped
    job = read.job
    start = position = outputs.take(job.bytes_out)
    results = []

    def work() -> None:
        nonlocal position
        source = inputs.memory[read.position : read.position + job.bytes_in]
        for piece, starts in zip(job.pieces, read.starts, strict=True):
            merger.merge(piece, source, starts, outputs.memory[position : position + piece.bytes_out])
            if piece.merged:
                output = piece.tensor.output
                results.append((output.name, position - start, piece.bytes_out, size_of(output.dtype, piece.first)))
            position += aligned(piece.bytes_out)

    with meter.at_work("merging", job.bytes_in + job.bytes_out):
        work() if way is None else way.run(work)
    inputs.release()
    workers.merged.put(_Merged(results, start, job.bytes_out))
    if progress is not None:
        progress(job.bytes_in + job.bytes_out)


def _read(stores: Sequence[TensorStore], jobs: Sequence[Job], ring: Ring, workers: _Workers, threads: int, meter: Meter) -> None:
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pymerge-read") as pool:
        for job in jobs:
            start = position = ring.take(job.bytes_in)
            starts: list[Starts] = []
            reads = []
            for piece in job.pieces:
                starts.append({})
                for key, (info, first, size) in input_pieces(piece).items():
                    starts[-1][key] = position - start
                    for begin in range(0, size, CHUNK):
                        end = min(begin + CHUNK, size)
                        reads.append((stores[key[0]], info, ring.view[position + begin : position + end], first + begin))
                    position += aligned(size)

            # A share of the reads for each thread, and not a task for each read: tensors may be tiny and many.
            with meter.at_work("reading", sum(len(target) for _, _, target, _ in reads)):
                for _ in pool.map(lambda share: _read_all(share, workers), [reads[i::threads] for i in range(threads)]):
                    pass
            workers.read.put(_Read(job, starts, start))
    workers.read.put(None)


def _upload(way: Route, inputs: Ring, workers: _Workers, meter: Meter) -> None:
    while (read := workers.read.get()) is not None:
        size = read.job.bytes_in
        position = way.inputs.take(size)
        with meter.at_work("uploading", size):
            way.upload(way.inputs.memory[position : position + size], inputs.memory[read.position : read.position + size])
        inputs.release()
        workers.to_merge.put(replace(read, position=position))


def _download(way: Route, outputs: Ring, workers: _Workers, meter: Meter) -> None:
    while (merged := workers.merged.get()) is not None:
        position = outputs.take(merged.nbytes)
        with meter.at_work("downloading", merged.nbytes):
            way.download(
                outputs.memory[position : position + merged.nbytes],
                way.outputs.memory[merged.position : merged.position + merged.nbytes],
            )
        way.outputs.release()
        workers.to_write.put(replace(merged, position=position))
    workers.to_write.put(None)


def _read_all(reads: list, workers: _Workers) -> None:
    for store, info, target, begin in reads:
        if workers.stopping.is_set():
            raise Stopped
        store.read_into(info, target, begin)


def _write(writer: CheckpointWriter, ring: Ring, workers: _Workers, meter: Meter) -> None:
    while True:
        merged: _Merged | None = workers.to_write.get()
        if merged is None or workers.stopping.is_set():
            return
        with meter.at_work("writing", sum(nbytes for _, _, nbytes, _ in merged.results)):
            for name, begin, nbytes, start in merged.results:
                writer.write(name, ring.view[merged.position + begin :][:nbytes], start)
        ring.release()
