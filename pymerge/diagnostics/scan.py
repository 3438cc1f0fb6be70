"""One pass over base and models: every tensor's statistics, in bounded memory, whatever the size of the files."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .. import ops
from ..diagnose_ops import PIECE, diagnose, new_statistics
from ..finite import NonFiniteError
from .models import Model
from .statistics import Statistics

__all__ = ["scan"]

SAMPLE_RUNS, SAMPLE_RUN = 16, 2048
"""What is read beforehand of a large tensor in a file, to estimate the trimming threshold: evenly spread runs, and their length."""


def scan(
    base: Model | None,
    models: Sequence[Model],
    names: Sequence[str],
    *,
    trim: float | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Statistics]:
    """Statistics of every named tensor.

    Files are read in pieces of 2^18 elements into memory that is used again and again: so many bytes of each model for each thread. Each
    thread computes on what it has just read, while that is in its cache. Results do not depend on the number of threads.

    Args:
        base: or None: the models are deltas, or are compared as they are.
        models: to compare; each has the names, with the base's shapes.
        names: of the tensors.
        trim: share of each tensor's deltas, the largest, that is kept where supports and signs are compared; None keeps all that are not
            zero. Exact for models in memory; for files the threshold is estimated from a sample, and the statistics have the share that
            was really kept.
        threads: that read and compute; by default one per CPU, at most 8.
        progress: called with the elements of each piece.

    Raises:
        NonFiniteError: an input has a NaN or an infinity.
        CheckpointError: a file changed or ended.
    """
    given = [m for m in (base, *models) if m is not None]
    threads = threads or min(8, os.cpu_count() or 1)
    local = threading.local()

    def buffers() -> list[bytearray]:
        if not hasattr(local, "buffers"):
            local.buffers = [bytearray(PIECE * 8) for _ in given]
        return local.buffers

    def work(name: str, start: int, count: int, selection: Tensor) -> Statistics:
        tensors = [m.part(name, start, count, buffer) for m, buffer in zip(given, buffers())]
        sums, counts = new_statistics(len(models))
        first, others = (None, tensors) if base is None else (tensors[0], tensors[1:])
        diagnose(first, others, selection - torch.tensor([0, start]), sums, counts, threads=1)
        if not all(map(math.isfinite, sums.tolist())):
            bad = next((m.label for m, t in zip(given, tensors) if not torch.isfinite(t.float()).all()), "the difference of two models")
            raise NonFiniteError(f"{bad}: {name!r} has a NaN or an infinity between elements {start} and {start + count}")
        if progress is not None:
            progress(count)
        return Statistics(len(models), count, sums, counts)

    found: dict[str, Statistics] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="pymerge-scan") as workers:
        waiting: deque[tuple[str, Future]] = deque()
        try:
            selections = _ahead(workers, lambda name: _selection(base, models, name, trim), names, threads)
            for name, selection in selections:
                n = torch.Size(given[0].shapes[name]).numel()
                found[name] = Statistics(len(models), n, *new_statistics(len(models)))
                for start in range(0, n, PIECE):
                    waiting.append((name, workers.submit(work, name, start, min(PIECE, n - start), selection)))
                    if len(waiting) > 4 * threads:
                        _take(waiting, found)
            while waiting:
                _take(waiting, found)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    return found


def _take(waiting: deque, found: dict[str, Statistics]) -> None:
    name, future = waiting.popleft()
    found[name].add(future.result())


def _ahead(workers: ThreadPoolExecutor, function: Callable, names: Sequence[str], ahead: int) -> Iterator[tuple[str, Tensor]]:
    """(name, function(name)) in order, computed a little ahead."""
    coming: deque[tuple[str, Future]] = deque()
    for name in names:
        coming.append((name, workers.submit(function, name)))
        if len(coming) > 2 * ahead:
            first, future = coming.popleft()
            yield first, future.result()
    for first, future in coming:
        yield first, future.result()


def _selection(base: Model | None, models: Sequence[Model], name: str, trim: float | None) -> Tensor:
    """int64 [models, 2]: (key, cut) of what is kept."""
    n = torch.Size(models[0].shapes[name]).numel()
    if trim is None or n == 0:
        return torch.tensor([[0, n - 1]] * len(models))
    exact = all(m.in_memory for m in (base, *models) if m is not None) or n <= 2 * SAMPLE_RUNS * SAMPLE_RUN
    starts = [0] if exact else [i * (n - SAMPLE_RUN) // (SAMPLE_RUNS - 1) for i in range(SAMPLE_RUNS)]
    length = n if exact else SAMPLE_RUN

    def sample(model: Model) -> Tensor:
        return model.parts(name, starts, length)

    sampled = len(starts) * length
    bases = None if base is None else [sample(base)]
    rows = ops.select(bases, [[sample(m)] for m in models], [round(trim * sampled)] * len(models))
    # Many deltas of bf16 models are equal; of those at the threshold the same share of the tensor is kept as of the sample.
    rows[:, 1] = torch.where(rows[:, 1] < 0, rows[:, 1], (rows[:, 1] + 1) * n // sampled - 1)
    return rows
