"""Times several programs in turn, so that a change in the machine's mood meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .ceiling import elapsed_ms

__all__ = ["Contender", "Times", "interleave", "ratio"]

WARM_MS = 250.0
"""Programs faster than this run once more, untimed, before they are timed: what fits into a cache is there then. Slower ones fill the
caches many times over, so nothing that was there before matters to them."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of each round, in the order in which they were measured."""

    ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def best(self) -> float:
        return min(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third; the only value's, twice, where there is one."""
        if len(self.ms) == 1:
            return self.ms[0], self.ms[0]
        first, _, third = statistics.quantiles(self.ms, n=4, method="inclusive")
        return first, third


def ratio(a: Times, b: Times) -> tuple[float, float, float]:
    """Median and quartiles of a's time over b's.

    Round by round where both have the same rounds: a machine that is slow for a while is slow for both. Else of the medians, and between
    the quartiles that are the farthest apart.
    """
    if len(a.ms) == len(b.ms):
        pairs = Times([x / y for x, y in zip(a.ms, b.ms)])
        return pairs.median, *pairs.quartiles
    return a.median / b.median, a.quartiles[0] / b.quartiles[1], a.quartiles[1] / b.quartiles[0]


@dataclass(frozen=True)
class Contender:
    """A program to time.

    Attributes:
        run: does the work once.
        seconds: to spend on it; it runs once at least, however long that takes.
        last_ms: of a run that was made before. If that took more than `seconds`, it is the only round.
    """

    run: Callable[[], object]
    seconds: float
    last_ms: float = 0.0


def interleave(
    contenders: Mapping[str, Contender], rounds: int, enough: Callable[[dict[str, Times]], bool] = lambda times: False
) -> dict[str, Times]:
    """Time each contender in turn, in every round, until it has had `rounds` rounds or its seconds are spent.

    Args:
        contenders: by name, in the order in which they run.
        rounds: at most.
        enough: asked after each round, with the times so far; True ends it.
    """
    times = {name: Times([c.last_ms] if c.last_ms > 1e3 * c.seconds else []) for name, c in contenders.items()}
    spent = dict.fromkeys(contenders, 0.0)
    for _ in range(rounds):
        for name, contender in contenders.items():
            done = times[name].ms
            if done and spent[name] + done[-1] / 1e3 > contender.seconds:
                continue
            began = time.perf_counter()
            if (done[-1] if done else contender.last_ms) < WARM_MS:
                contender.run()
            done.append(elapsed_ms(contender.run))
            spent[name] += time.perf_counter() - began
        if enough(times):
            break
    return times
