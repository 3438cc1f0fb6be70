"""Reading, merging and writing at the same time: one thread each, with bounded memory between them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .memory import Job, input_pieces, make_jobs
from .plan import Plan, TensorPlan
from .ring import Ring, Stopped, aligned
from .writer import CheckpointWriter

__all__ = ["MergeJob", "Starts", "run"]

CHUNK = 16 * 2**20
"""Bytes per read: reads of one tensor are spread over the threads, and a stop is noticed between two of them."""

Starts = dict[tuple[int, str], int]
"""(Checkpoint index, tensor's name there) -> where its bytes begin in the input ring."""

MergeJob = Callable[[TensorPlan, memoryview, Starts, memoryview, int], None]


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


def run(plan: Plan, writer: CheckpointWriter, merge: MergeJob, threads: int, progress: Callable[[int], None] | None) -> None:
    """Carry out a plan.

    Args:
        plan: what to do.
        writer: entered already.
        merge: merges one tensor: called in this thread with its plan, the input ring's memory, where its inputs begin there, the output
            ring's memory and where its output is to go.
        threads: that read.
        progress: called in this thread with the bytes (read and written) of each job that was merged.

    Raises:
        whatever reading, merging or writing raised first. All threads have ended when this returns or raises.
    """
    jobs = make_jobs(plan.tensors)
    inputs, outputs = Ring(plan.buffers.inputs), Ring(plan.buffers.outputs)
    workers = _Workers((inputs, outputs))
    try:
        workers.start("reader", lambda: _read(plan, jobs, inputs, workers, threads))
        workers.start("writer", lambda: _write(writer, outputs, workers))
        for job in jobs:
            starts = workers.read.get()
            if starts is None:
                raise Stopped
            position = outputs.take(job.bytes_out)
            written = []
            for tensor in job.tensors:
                merge(tensor, inputs.view, starts[tensor.output.name], outputs.view, position)
                written.append((tensor.output.name, position, tensor.output.nbytes))
                position += aligned(tensor.output.nbytes)
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


def _read(plan: Plan, jobs: list[Job], ring: Ring, workers: _Workers, threads: int) -> None:
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pymerge-read") as pool:
        for job in jobs:
            position = ring.take(job.bytes_in)
            starts: dict[str, Starts] = {}
            reads = []
            for tensor in job.tensors:
                infos = {(index, info.name): info for index, info in tensor.inputs}
                own = starts[tensor.output.name] = {}
                for key, size in input_pieces(tensor).items():
                    own[key] = position
                    checkpoint, info = plan.checkpoints[key[0]], infos[key]
                    for begin in range(0, info.nbytes, CHUNK):
                        end = min(begin + CHUNK, info.nbytes)
                        reads.append((checkpoint, info, ring.view[position + begin : position + end], begin))
                    position += size

            # A share of the reads for each thread, and not a task for each read: tensors may be tiny and many.
            for _ in pool.map(lambda share: _read_all(share, workers), [reads[i::threads] for i in range(threads)]):
                pass
            workers.read.put(starts)


def _read_all(reads: list, workers: _Workers) -> None:
    for checkpoint, info, target, begin in reads:
        if workers.stopping.is_set():
            raise Stopped
        checkpoint.read_into(info, target, begin)


def _write(writer: CheckpointWriter, ring: Ring, workers: _Workers) -> None:
    while True:
        written = workers.merged.get()
        if written is None or workers.stopping.is_set():
            return
        for name, start, nbytes in written:
            writer.write(name, ring.view[start : start + nbytes])
        ring.release()
