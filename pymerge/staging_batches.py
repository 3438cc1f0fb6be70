"""How tensors are divided into the batches of :mod:`pymerge.staging`, and where they lie in a batch's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .many_ops import Job

__all__ = ["Batch", "batches", "bytes_of", "inputs_of", "typed"]

SLICE = 2**23  # elements of a batch: 84 MB for four bf16 models and their result
ALIGNMENT = 128  # bytes: what the kernels' widest loads, and a line of the cache, like best


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of job number `job`, and where their inputs (base first) and their result lie among the batch's."""

    job: int
    start: int
    stop: int
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Batch:
    pieces: list[Piece]
    input_bytes: int
    result_bytes: int


def inputs_of(job: Job) -> list[Tensor]:
    return [*([] if job.base is None else [job.base]), *job.models]


def batches(jobs: Sequence[Job], sliced: bool, together: bool) -> Iterator[Batch]:
    """Up to SLICE elements each; more where a tensor has more and is not `sliced`, or where all go `together`."""
    spans: list[tuple[int, int, int]] = []
    elements = 0
    for number, job in enumerate(jobs):
        n = job.models[0].numel()
        step = SLICE if sliced else max(n, 1)
        for start in range(0, max(n, 1), step):
            stop = min(start + step, n)
            if spans and not together and elements + stop - start > SLICE:
                yield _laid_out(jobs, spans)
                spans, elements = [], 0
            spans.append((number, start, stop))
            elements += stop - start
    if spans:
        yield _laid_out(jobs, spans)


def _laid_out(jobs: Sequence[Job], spans: Sequence[tuple[int, int, int]]) -> Batch:
    pieces, input_bytes, result_bytes = [], 0, 0
    for number, start, stop in spans:
        places = []
        for t in inputs_of(jobs[number]):
            places.append(input_bytes)
            input_bytes += _room(stop - start, t.dtype)
        pieces.append(Piece(number, start, stop, tuple(places), result_bytes))
        result_bytes += _room(stop - start, jobs[number].dtype)
    return Batch(pieces, input_bytes, result_bytes)


def _room(elements: int, dtype: torch.dtype) -> int:
    return -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def bytes_of(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat[start:stop].view(torch.uint8)


def typed(memory: Tensor, at: int, elements: int, dtype: torch.dtype) -> Tensor:
    return memory[at : at + elements * dtype.itemsize].view(dtype)
