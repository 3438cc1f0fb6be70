"""The plain recipe: after each new sample, with some probability, one old one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

__all__ = ["accepted", "iter_replay_stream", "make_replay_stream"]

BLOCK = 4096  # draws at a time; torch's generator gives the same numbers one by one


def make_replay_stream(new_data: Iterable, old_data: Iterable, replay_ratio: float = 0.3, seed: int = 0) -> list[tuple[str, Any]]:
    """New samples in their order, each followed by one old sample with probability `replay_ratio`.

    Old samples are taken in their order, over and over. The draws are those of ``torch.rand(1, generator=g).item() < replay_ratio`` with
    ``g = torch.Generator().manual_seed(seed)``, one for each new sample.

    `replay_ratio` is a probability per *new* sample: the old samples' share of the stream is ``r / (1 + r)``, 23 % for 0.3, and at most one
    half. :class:`ReplayMixer` takes the share itself, keeps it exactly and reshuffles.

    Args:
        new_data: any iterable, read once.
        old_data: any iterable; what has no length and index is cached as it is used.
        replay_ratio: in [0, 1].
        seed: of the draws; any integer that torch takes.

    Returns:
        list of ("new", sample) and ("old", sample).

    Raises:
        ValueError: `replay_ratio` is outside [0, 1], or above 0 with no old data.
    """
    return list(iter_replay_stream(new_data, old_data, replay_ratio, seed))


def iter_replay_stream(new_data: Iterable, old_data: Iterable, replay_ratio: float = 0.3, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """:func:`make_replay_stream` one item at a time, for data that do not fit in memory or never end."""
    if not 0.0 <= replay_ratio <= 1.0:
        raise ValueError(f"replay_ratio is {replay_ratio}; it is a probability per new sample, between 0 and 1")
    old = _forever(old_data) if replay_ratio > 0 else iter(())
    return _stream(new_data, old, replay_ratio, seed)


def accepted(ratio: float, seed: int) -> Iterator[list[bool]]:
    """Whether an old sample follows the next new ones, in blocks, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        # Compared in fp64, as Python compares the draw with the ratio.
        yield (torch.rand(BLOCK, generator=generator).double() < ratio).tolist()


def _stream(new_data: Iterable, old: Iterator, ratio: float, seed: int) -> Iterator[tuple[str, Any]]:
    follows = itertools.chain.from_iterable(accepted(ratio, seed))
    for sample, old_follows in zip(new_data, follows):
        yield "new", sample
        if old_follows:
            yield "old", next(old)


def _forever(data: Iterable) -> Iterator:
    if isinstance(data, Sequence):
        if not len(data):
            raise ValueError("old_data is empty and replay_ratio is above 0; give old samples, or a ratio of 0")
        return (data[i] for i in itertools.chain.from_iterable(map(range, itertools.repeat(len(data)))))
    items = iter(data)
    try:
        first = next(items)
    except StopIteration:
        raise ValueError("old_data is empty and replay_ratio is above 0; give old samples, or a ratio of 0") from None
    return itertools.cycle(itertools.chain([first], items))
