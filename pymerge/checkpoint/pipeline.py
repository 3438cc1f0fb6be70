"""Reading, merging and writing at the same time: one thread each, with bounded memory between them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from .memory import Job, Piece, Schedule, input_pieces, size_of
from .meter import Meter
from .ring import Ring, Stopped, aligned
from .store import TensorStore
from .writer import CheckpointWriter

__all__ = ["PieceMerger", "Starts", "run"]

CHUNK = 16 * 2**20
"""Bytes per read: reads of one tensor are spread over the threads, and a stop is noticed between two of them."""

Starts = dict[tuple[int, str], int]
"""(Checkpoint index, tensor's name there) -> where its bytes begin in the input ring."""


class PieceMerger(Protocol):
    """The step between reading and writing. It runs in one thread, piece after piece in the schedule's order."""

    def merge(self, piece: Piece, source: memoryview, starts: Starts, target: memoryview, position: int) -> None:
        """Merge a piece, or gather from it what its pass is for.

        Args:
            piece: whose inputs have been read.
            source: the input ring's memory.
            starts: where the inputs begin there.
            target: the output ring's memory.
            position: where the output is to go there.
        """


class _Workers:
    """The reading and the writing thread. The first error of any stops all and is kept for the main thread to raise."""

    def __init__(self, rings: tuple[Ring, Ring]) -> None:
        self.error: BaseException | None = None
        self.read: queue.SimpleQueue = queue.SimpleQueue()
        self.merged: queue.SimpleQueue = queue.SimpleQueue()
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
        self.read.put(None)
        self.merged.put(None)

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
    workers = _Workers((inputs, outputs))
    try:
        workers.start("reader", lambda: _read(stores, schedule.jobs, inputs, workers, threads, meter))
        workers.start("writer", lambda: _write(writer, outputs, workers, meter))
        for job in schedule.jobs:
            starts = workers.read.get()
            if starts is None:
                raise Stopped
            position = outputs.take(job.bytes_out)
            written = []
            with meter.at_work("merging", job.bytes_in + job.bytes_out):
                for piece, own in zip(job.pieces, starts, strict=True):
                    merger.merge(piece, inputs.view, own, outputs.view, position)
                    if piece.merged:
                        output = piece.tensor.output
                        written.append((output.name, position, piece.bytes_out, size_of(output.dtype, piece.first)))
                    position += aligned(piece.bytes_out)
            inputs.release()
            workers.merged.put(written)
            if progress is not None:
                progress(job.bytes_in + job.bytes_out)
        workers.merged.put(None)
        workers.join()
    except Stopped:
        pass
    finally:
        workers.stop()
        workers.join()
    if workers.error is not None:
        raise workers.error


def _read(stores: Sequence[TensorStore], jobs: Sequence[Job], ring: Ring, workers: _Workers, threads: int, meter: Meter) -> None:
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pymerge-read") as pool:
        for job in jobs:
            position = ring.take(job.bytes_in)
            starts: list[Starts] = []
            reads = []
            for piece in job.pieces:
                starts.append({})
                for key, (info, first, size) in input_pieces(piece).items():
                    starts[-1][key] = position
                    for begin in range(0, size, CHUNK):
                        end = min(begin + CHUNK, size)
                        reads.append((stores[key[0]], info, ring.view[position + begin : position + end], first + begin))
                    position += aligned(size)

            # A share of the reads for each thread, and not a task for each read: tensors may be tiny and many.
            with meter.at_work("reading", sum(len(target) for _, _, target, _ in reads)):
                for _ in pool.map(lambda share: _read_all(share, workers), [reads[i::threads] for i in range(threads)]):
                    pass
            workers.read.put(starts)


def _read_all(reads: list, workers: _Workers) -> None:
    for store, info, target, begin in reads:
        if workers.stopping.is_set():
            raise Stopped
        store.read_into(info, target, begin)


def _write(writer: CheckpointWriter, ring: Ring, workers: _Workers, meter: Meter) -> None:
    while True:
        written = workers.merged.get()
        if written is None or workers.stopping.is_set():
            return
        with meter.at_work("writing", sum(nbytes for _, _, nbytes, _ in written)):
            for name, position, nbytes, start in written:
                writer.write(name, ring.view[position : position + nbytes], start)
        ring.release()
