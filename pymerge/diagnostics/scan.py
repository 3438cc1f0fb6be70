"""One pass over base and models: every tensor's statistics, in bounded memory, whatever the size of the files."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.format import CheckpointError
from ..diagnose_ops import PIECE, can_read, diagnose, diagnose_files, new_statistics
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

    Files are read a few elements at a time into memory that is used again and again, so that each thread computes on what is still in its
    cache: 2^16 elements of each model where the core reads by itself, 2^20 where they must be made first (an adapter on a model, fp8).
    Results do not depend on the number of threads.

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
        sums, counts = new_statistics(len(models))
        if not _from_files(base, models, name, start, count, selection, sums, counts):
            first, *others = [None] * (base is None) + [m.part(name, start, count, buffer) for m, buffer in zip(given, buffers())]
            diagnose(first, others, selection - torch.tensor([0, start]), sums, counts, threads=1)
        if not all(map(math.isfinite, sums.tolist())):
            bad = (m.label for m in given if not torch.isfinite(m.part(name, start, count).float()).all())
            label = next(bad, "the difference of two models")
            raise NonFiniteError(f"{label}: {name!r} has a NaN or an infinity between elements {start} and {start + count}")
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


def _from_files(
    base: Model | None, models: Sequence[Model], name: str, start: int, count: int, selection: Tensor, sums: Tensor, counts: Tensor
) -> bool:
    """Add the statistics of a part of a tensor that the core reads by itself; False where it cannot, nothing having been done."""
    given = [m for m in (base, *models) if m is not None]
    dtypes, places = [m.dtype(name) for m in given], [m.place(name) for m in given]
    if None in places or not can_read(dtypes):
        return False
    with ExitStack() as opened:
        files = [opened.enter_context(place) for place in places]
        parts = [(file, offset + start * dtype.itemsize, dtype) for (file, offset), dtype in zip(files, dtypes)]
        rows = [(key, cut - start) for key, cut in selection.tolist()]
        first, others = (None, parts) if base is None else (parts[0], parts[1:])
        failed = diagnose_files(count, first, others, rows, sums, counts)
    if failed >= 0:
        given[failed].part(name, start, count)  # says what is wrong
        raise CheckpointError(f"{given[failed].label}: {name!r} could not be read, and then could; run this again")
    return True


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

    sampled = len(starts) * length
    bases = None if base is None else [base.parts(name, starts, length)]
    rows = ops.select(bases, [[m.parts(name, starts, length)] for m in models], [round(trim * sampled)] * len(models))
    # Many deltas of bf16 models are equal; of those at the threshold the same share of the tensor is kept as of the sample.
    rows[:, 1] = torch.where(rows[:, 1] < 0, rows[:, 1], (rows[:, 1] + 1) * n // sampled - 1)
    return rows
