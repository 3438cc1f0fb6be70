"""How far to go from an old model to a new one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..merge_methods.wise_ft import wise_ft
from ..metrics.plots import pareto_front

__all__ = ["Interpolation", "wise_ft_search"]

Scores = tuple[float, float]


@dataclass(frozen=True)
class Interpolation:
    """What :func:`wise_ft_search` found.

    Attributes:
        scores: alpha -> (score on old tasks, score on the new one), ascending; 0 is the base, 1 the tuned model.
        alpha: the chosen one.
        model: the model there, of the base's kind.
        allowed: the least score on old tasks that was accepted.
    """

    scores: Mapping[float, Scores]
    alpha: float
    model: Any
    allowed: float

    @property
    def front(self) -> list[float]:
        """The alphas that no other beats in both scores."""
        return [float(name) for name in pareto_front({repr(a): s for a, s in self.scores.items()})]


def wise_ft_search(
    base: Any,
    tuned: Any,
    evaluate: Callable[[Any], Scores],
    *,
    alphas: int | Sequence[float] = 11,
    max_drop: float = 0.0,
    min_old: float | None = None,
) -> Interpolation:
    """Evaluate ``(1 - alpha) base + alpha tuned`` and take the best on the new task among those that keep the old ones
    (Wortsman et al. 2022, arXiv:2109.01903).

    Args:
        base, tuned: models of one kind, as :func:`pymerge.wise_ft` takes them.
        evaluate: model (for modules a state dict) -> (score on old tasks, score on the new task), both more is better, on data held out.
        alphas: so many evenly spaced from 0 to 1, or a list; 0 is always tried.
        max_drop: how much below the base's score on old tasks is acceptable.
        min_old: the acceptable score itself, instead.

    Returns:
        An :class:`Interpolation`. Equal scores on the new task: the higher on the old ones, then the smaller alpha. If not even the base is
        acceptable under `min_old`, the error says what is reached.

    Raises:
        ValueError: nothing is acceptable, or a score is NaN.
    """
    if max_drop < 0:
        raise ValueError(f"max_drop is {max_drop}; it is how much may be lost, at least 0")
    if isinstance(alphas, int):
        if alphas < 2:
            raise ValueError(f"alphas is {alphas}; at least both ends are tried")
        tried = [i / (alphas - 1) for i in range(alphas)]
    else:
        tried = sorted({0.0, *map(float, alphas)})
        if tried[0] < 0 or tried[-1] > 1:
            raise ValueError(f"alphas reach from {tried[0]} to {tried[-1]}; they interpolate, so from 0 to 1")
    scores: dict[float, Scores] = {}
    for alpha in tried:
        # Always from both ends: steps added up would round at each.
        old, new = map(float, evaluate(wise_ft(base, tuned, alpha=alpha)))
        if math.isnan(old) or math.isnan(new):
            raise ValueError(f"the scores at alpha {alpha:g} are {old} and {new}")
        scores[alpha] = (old, new)
    allowed = scores[0.0][0] - max_drop if min_old is None else min_old
    good = [alpha for alpha, (old, _) in scores.items() if old >= allowed]
    if not good:
        best = max(old for old, _ in scores.values())
        raise ValueError(f"no alpha keeps {allowed:g} on the old tasks; the most that is reached is {best:g}")
    chosen = max(good, key=lambda alpha: (scores[alpha][1], scores[alpha][0], -alpha))
    return Interpolation(scores, chosen, wise_ft(base, tuned, alpha=chosen), allowed)
