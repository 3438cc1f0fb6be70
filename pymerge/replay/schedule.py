"""Which source each place of a mixed stream comes from, and how many of that source came before.

A schedule covers one epoch. Source 0 is the new data, the others are old. All of them can be asked for any place at once:

* exact: the old samples among the first n are ``floor(n r + 1/2)``, in integers, so that every prefix is within one sample of the ratio.
  The old samples are dealt out to their sources the same way, by a tree of such halvings with the heaviest sources nearest the root;
* bernoulli: the draws of :func:`pymerge.replay.make_replay_stream`, kept as one byte each;
* tokens: the source that is furthest behind in tokens comes next; worked out once and kept as one byte a place.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from .stream import BLOCK, accepted

__all__ = ["BernoulliSchedule", "Dealer", "ExactSchedule", "Schedule", "TokenSchedule", "exact_fraction"]

Stages = Sequence[tuple[int, Sequence[float]]]

NEW = 0
STEP = 1024  # places between stored counts


class Schedule(Protocol):
    """One epoch's plan."""

    def __len__(self) -> int: ...

    def at(self, place: int) -> tuple[int, int]:
        """(source, how many of it came before) at a place in ``range(len(self))``."""
        ...

    def counts(self, length: int) -> list[int]:
        """How many of each source are among the first `length` places."""
        ...


def exact_fraction(value: float) -> Fraction:
    """The decimal that was written: 0.1 is one tenth, not the binary number next to it."""
    return Fraction(repr(float(value)))


def _quota(n: int, share: Fraction) -> int:
    """floor(n share + 1/2): grows by 0 or 1 with n for shares up to 1, and is never more than 1/2 away from n share."""
    return (2 * n * share.numerator + share.denominator) // (2 * share.denominator)


@dataclass(frozen=True)
class _Node:
    left: _Node | int
    right: _Node | int
    share: Fraction  # of the left side


def _tree(weights: Sequence[Fraction]) -> _Node | int:
    """Huffman's tree over the sources with weight, numbered from 1."""
    heap: list[tuple[Fraction, int, _Node | int]] = [(w, i, i) for i, w in enumerate(weights, 1) if w > 0]
    heapq.heapify(heap)
    ticket = itertools.count(len(weights) + 1)
    while len(heap) > 1:
        (light, _, right), (heavy, _, left) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (light + heavy, next(ticket), _Node(left, right, heavy / (light + heavy))))
    return heap[0][2]


@dataclass(frozen=True)
class _Stage:
    start: int  # of the old samples
    tree: _Node | int
    counts: tuple[int, ...]  # of every source before it


class Dealer:
    """Deals old samples, counted from 0, out to their sources by weight; weights may change at given places.

    Args:
        stages: (first old sample, weights of the old sources), the first at 0, ascending. Weights need not sum to 1.
    """

    def __init__(self, stages: Stages) -> None:
        self._sources = len(stages[0][1]) + 1
        self._stages: list[_Stage] = []
        self._starts = [start for start, _ in stages]
        for start, weights in stages:
            counts = tuple(self.counts(start)) if self._stages else (0,) * self._sources
            self._stages.append(_Stage(start, _tree([exact_fraction(w) for w in weights]), counts))

    def at(self, number: int) -> tuple[int, int]:
        """(source, how many of it came before) of the old sample with this number."""
        stage = self._stages[bisect_right(self._starts, number) - 1]
        node, n = stage.tree, number - stage.start
        while isinstance(node, _Node):
            left = _quota(n, node.share)
            node, n = (node.left, left) if _quota(n + 1, node.share) > left else (node.right, n - left)
        return node, stage.counts[node] + n

    def counts(self, numbers: int) -> list[int]:
        """How many of each source are among the first `numbers` old samples; that of source 0 is 0."""
        # A stage that starts at `numbers` is not entered: this is asked while that very stage is being made.
        stage = self._stages[min(bisect_right(self._starts[: len(self._stages)], max(numbers - 1, 0)), len(self._stages)) - 1]
        counts = list(stage.counts)
        todo = [(stage.tree, numbers - stage.start)]
        while todo:
            node, n = todo.pop()
            if isinstance(node, _Node):
                left = _quota(n, node.share)
                todo += [(node.left, left), (node.right, n - left)]
            else:
                counts[node] += n
        return counts


class ExactSchedule:
    """See the module.

    Args:
        new: number of new samples; the stream ends with the last, or after `length` places.
        share: of the old samples in the stream, below 1.
        stages: (first place, weights of the old sources), ascending from 0.
    """

    def __init__(self, new: int, share: Fraction, stages: Stages, length: int | None = None) -> None:
        self._share = share
        self._dealer = Dealer([(_quota(place, share), weights) for place, weights in stages])
        self._length = self._length_for(new) if length is None else length

    def _length_for(self, new: int) -> int:
        """The first length that has all new samples."""
        low, high = new, int(new / (1 - self._share)) + 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if middle - _quota(middle, self._share) >= new else (middle + 1, high)
        return low

    def __len__(self) -> int:
        return self._length

    def at(self, place: int) -> tuple[int, int]:
        old = _quota(place, self._share)
        return self._dealer.at(old) if _quota(place + 1, self._share) > old else (NEW, place - old)

    def counts(self, length: int) -> list[int]:
        old = _quota(length, self._share)
        counts = self._dealer.counts(old)
        counts[NEW] = length - old
        return counts


class _Stored:
    """A schedule kept as one byte a place, with the counts at every STEP-th."""

    def __init__(self, sources: bytes, count: int) -> None:
        self._sources, self._count = sources, count
        self._marks = [[0] * count]
        for begin in range(0, len(sources), STEP):
            block = sources[begin : begin + STEP]
            self._marks.append([have + block.count(s) for s, have in enumerate(self._marks[-1])])

    def __len__(self) -> int:
        return len(self._sources)

    def _before(self, source: int, place: int) -> int:
        mark = place // STEP
        return self._marks[mark][source] + self._sources.count(source, mark * STEP, place)

    def at(self, place: int) -> tuple[int, int]:
        source = self._sources[place]
        return source, self._before(source, place)

    def counts(self, length: int) -> list[int]:
        return [self._before(source, length) for source in range(self._count)]


class BernoulliSchedule:
    """See the module: after each new sample an old one with `probability`; the rest as :class:`ExactSchedule` has it."""

    def __init__(self, new: int, probability: float, seed: int, stages: Stages, length: int | None = None) -> None:
        places = bytearray()
        left = new
        for block in accepted(probability, seed):
            if left <= 0 or (length is not None and len(places) >= length):
                break
            for old_follows in block[:left]:
                places += b"\0\1" if old_follows else b"\0"
            left -= BLOCK
        self._stored = _Stored(bytes(places[:length]), 2)
        last = len(self._stored)
        self._dealer = Dealer([(self._stored.counts(min(place, last))[1], weights) for place, weights in stages])

    def __len__(self) -> int:
        return len(self._stored)

    def at(self, place: int) -> tuple[int, int]:
        source, before = self._stored.at(place)
        return (NEW, before) if source == NEW else self._dealer.at(before)

    def counts(self, length: int) -> list[int]:
        new, old = self._stored.counts(length)
        counts = self._dealer.counts(old)
        counts[NEW] = new
        return counts


class TokenSchedule(_Stored):
    """See the module.

    Args:
        new: number of new samples; the stream ends with the last, or with `budget`.
        shares: of the tokens, by source, summing to 1; as stages (first place, shares), ascending from 0.
        length: tokens of the sample that a source gives as its i-th: ``length(source, i)``.
        budget: tokens after which the stream ends.
    """

    def __init__(self, new: int, shares: Stages, length: Callable[[int, int], int], budget: int | None = None) -> None:
        stages = iter([*shares[1:], (None, ())])
        upcoming, next_share = next(stages)
        share = list(shares[0][1])
        count = len(share)
        used, tokens, target = [0] * count, [0] * count, [0.0] * count
        places = bytearray()
        while used[NEW] < new and (budget is None or sum(tokens) < budget):
            if len(places) == upcoming:
                share = list(next_share)
                upcoming, next_share = next(stages)
            # Targets grow by what the last sample brought, so that a change of shares does not ask for the past to be made up for.
            source = max((s for s in range(count) if share[s] > 0), key=lambda s: (target[s] - tokens[s], share[s], -s))
            size = length(source, used[source])
            places.append(source)
            used[source] += 1
            tokens[source] += size
            for s in range(count):
                target[s] += share[s] * size
        self.tokens = tuple(tokens)
        super().__init__(bytes(places), count)
