"""Is the new score lower than the old one, or only different? Differences with their uncertainty, and the two one-sided tests of a gate.

Scores are "more is better" here. Needs scipy (``pip install "pymerge-kernels[report]"``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Comparison", "compare_items", "compare_means", "holm"]


@dataclass(frozen=True)
class Comparison:
    """The difference new - old.

    Attributes:
        difference: of the means.
        stderr: of the difference.
        degrees: of freedom of its t distribution; infinite for the normal one.
        method: how it was compared: ``"paired"`` or ``"unpaired"``.
        items: how many, 0 where that is not known.
        binary: of paired items that are right or wrong: (wrong then right, right then wrong).
    """

    difference: float
    stderr: float
    degrees: float
    method: str
    items: int = 0
    binary: tuple[int, int] | None = None

    def p_not_inferior(self, margin: float) -> float:
        """One-sided p value of "worse by `margin` or more": small says that the new model is not."""
        return self._p_above(-margin)

    def p_inferior(self, drop: float = 0.0) -> float:
        """One-sided p value of "worse by at most `drop`": small says that it is worse by more."""
        return 1.0 - self._p_above(-drop) if self.binary is None else self._tango(-drop, upper=False)

    def _p_above(self, threshold: float) -> float:
        """P(a difference this large or larger | the true one is `threshold`)."""
        if self.binary is not None:
            return self._tango(threshold, upper=True)
        from scipy import stats

        if self.stderr == 0:
            return 0.0 if self.difference > threshold else 1.0
        t = (self.difference - threshold) / self.stderr
        return float(stats.t.sf(t, self.degrees) if math.isfinite(self.degrees) else stats.norm.sf(t))

    def _tango(self, threshold: float, upper: bool) -> float:
        """Tango's score test (1998): the variance of the difference under the hypothesis, from the maximum-likelihood share of items that
        got worse when the true difference is `threshold`. At 0 it is McNemar's test."""
        from scipy import stats

        better, worse = self.binary
        n = self.items
        a = 2 * n
        # The share q of items that got worse, when q + threshold got better, maximises the likelihood where a q^2 + b q + c = 0.
        b = -(better + worse) + (2 * n - better + worse) * threshold
        c = -worse * threshold * (1 - threshold)
        q = (-b + math.sqrt(max(b * b - 4 * a * c, 0.0))) / (2 * a)
        variance = n * (2 * q + threshold * (1 - threshold))
        excess = better - worse - n * threshold
        if variance <= 0:
            return 0.0 if (excess > 0) == upper and excess != 0 else 1.0
        z = excess / math.sqrt(variance)
        return float(stats.norm.sf(z) if upper else stats.norm.cdf(z))

    def interval(self, confidence: float = 0.90) -> tuple[float, float]:
        """Two-sided interval of the difference: what the one-sided tests at ``(1 - confidence) / 2`` do not refuse."""
        alpha = (1 - confidence) / 2
        if self.binary is not None:
            from scipy import optimize

            def end(edge: float, upper: bool) -> float:
                def excess(difference: float) -> float:
                    return self._tango(difference, upper) - alpha

                return edge if excess(edge) > 0 else float(optimize.brentq(excess, self.difference, edge))

            return end(-1.0, True), end(1.0, False)
        from scipy import stats

        reach = (stats.t.isf(alpha, self.degrees) if math.isfinite(self.degrees) else stats.norm.isf(alpha)) * self.stderr
        return self.difference - reach, self.difference + reach

    def detectable_drop(self, alpha: float = 0.05, power: float = 0.8) -> float:
        """The smallest true drop that a one-sided test finds with this power, at this many items and this scatter."""
        from scipy import stats

        return float(stats.norm.isf(alpha) + stats.norm.isf(1 - power)) * self.stderr

    def items_needed(self, margin: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
        """Items after which a model that did not change passes with this power; None when the present number is not known."""
        if not self.items:
            return None
        if margin <= 0:
            return None
        return math.ceil(self.items * (self.detectable_drop(alpha, power) / margin) ** 2)


def compare_items(old: Sequence, new: Sequence) -> Comparison:
    """Two models on the same items: what counts is how many items changed, not how many there are.

    Right-or-wrong scores are compared by Tango's score test (1998), others by the t test of their differences. Rows of repeated runs
    (seeds) are averaged by item first, since repetitions of an item are not independent items.

    Args:
        old, new: scores in the same order of items, ``[items]`` or ``[runs, items]``.

    Raises:
        ValueError: no items, different numbers of them, or a score that is not finite.
    """
    before, after = _by_item(old, "old"), _by_item(new, "new")
    if len(before) != len(after):
        raise ValueError(f"{len(before)} old and {len(after)} new scores; a paired comparison is of the same items in the same order")
    n = len(before)
    differences = [b - a for a, b in zip(before, after)]
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / max(n - 1, 1) / n)
    if set(before) | set(after) <= {0.0, 1.0}:
        better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        # Half an item more on either side: where no item changed, the scatter is small but not zero.
        changed = (better + worse + 1) / (n + 1)
        spread = math.sqrt((changed - ((better - worse) / (n + 1)) ** 2) / (n + 1))
        return Comparison(mean, spread, math.inf, "paired", n, (better, worse))
    if n < 2:
        raise ValueError("one item cannot be compared: its scatter is unknown")
    return Comparison(mean, spread, n - 1, "paired", n)


def _by_item(scores: Sequence, what: str) -> list[float]:
    rows: list[Any] = scores.tolist() if hasattr(scores, "tolist") else list(scores)
    if rows and hasattr(rows[0], "__len__"):
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"{what}: runs of {sorted({len(row) for row in rows})} items; every run needs all items")
        rows = [math.fsum(column) / len(rows) for column in zip(*rows)]
    values = [float(x) for x in rows]
    if not values:
        raise ValueError(f"{what}: there are no scores")
    bad = next((i for i, x in enumerate(values) if not math.isfinite(x)), None)
    if bad is not None:
        raise ValueError(f"{what}: the score of item {bad} is {values[bad]}")
    return values


def compare_means(old: float, old_stderr: float, new: float, new_stderr: float, items: int = 0) -> Comparison:
    """Two means with standard errors, as if measured on independent items. Where the items are the same this sees less than
    :func:`compare_items`: it counts the items' own scatter, which both models share."""
    for what, value in (("old", old), ("new", new), ("old_stderr", old_stderr), ("new_stderr", new_stderr)):
        if not math.isfinite(value) or ("stderr" in what and value < 0):
            raise ValueError(f"{what} is {value}; an unpaired comparison needs both means and both standard errors")
    return Comparison(new - old, math.hypot(old_stderr, new_stderr), math.inf, "unpaired", items)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): the chance of any false rejection among all stays below alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
