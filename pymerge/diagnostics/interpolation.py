"""Is the way from one model to another level? Linear mode connectivity: the loss along the straight line between two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..merge_methods.wise_ft import wise_ft
from .models import named

__all__ = ["BarrierMatrix", "InterpolationCurve", "barrier_matrix", "interpolate_eval", "loss_barrier"]

KINDS = ("linear", "mean", "max")


@dataclass(frozen=True)
class InterpolationCurve:
    """Losses along (1 - alpha) a + alpha b.

    Attributes:
        alphas: ascending, from 0 to 1.
        losses: there; lower is better.
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    def heights(self, kind: str = "linear") -> tuple[float, ...]:
        """Loss above the reference of a kind of barrier, at each alpha."""
        first, last = self.losses[0], self.losses[-1]
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; choose one of {', '.join(map(repr, KINDS))}")
        if kind == "linear":
            return tuple(loss - ((1 - a) * first + a * last) for a, loss in zip(self.alphas, self.losses))
        level = (first + last) / 2 if kind == "mean" else max(first, last)
        return tuple(loss - level for loss in self.losses)

    def barrier(self, kind: str = "linear") -> float:
        """How high the loss rises in between.

        ``"linear"``: max_alpha L(alpha) - ((1 - alpha) L(0) + alpha L(1)) (Entezari et al. 2022); ``"mean"``: max_alpha L(alpha) -
        (L(0) + L(1)) / 2 (Frankle et al. 2020, there of the error: up to 2 % is stable); ``"max"``: above the worse end. The maximum is
        over all alphas, ends included, so "linear" and "max" are at least 0.
        """
        return max(self.heights(kind))

    @property
    def midpoint(self) -> float:
        """The linear height at alpha = 1/2, where the average of both is; below 0, averaging helps. NaN if it was not evaluated."""
        return next((h for a, h in zip(self.alphas, self.heights()) if a == 0.5), math.nan)

    @property
    def relative_barrier(self) -> float:
        """The linear barrier by the mean loss of the ends."""
        mean = (self.losses[0] + self.losses[-1]) / 2
        return self.barrier() / mean if mean else math.nan

    def best(self) -> tuple[float, float]:
        """(alpha, loss) of the lowest loss; of equal ones the smallest alpha."""
        return min(zip(self.alphas, self.losses), key=lambda point: (point[1], point[0]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        barriers = {kind: self.barrier(kind) for kind in KINDS}
        return {"alphas": list(self.alphas), "losses": list(self.losses), "barrier": barriers, "best": list(self.best())}

    def to_text(self) -> str:
        """In words."""
        height, (alpha, loss) = self.barrier(), self.best()
        where = self.alphas[max(range(len(self.alphas)), key=lambda i: self.heights()[i])]
        first = f"barrier {height:.4g} at alpha {where:.3g}" if height > 0 else "no barrier"
        return f"{first} (loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}); lowest loss {loss:.4g} at alpha {alpha:.3g}\n"

    def plot(self) -> Any:
        """A matplotlib figure of the losses and the line that they are measured against."""
        from .plots import interpolation

        return interpolation(self)


def interpolate_eval(
    a: Any, b: Any, evaluate: Callable[[Any], float], alphas: int | Sequence[float] = 11, *, refine: int = 0
) -> InterpolationCurve:
    """Evaluate models along the straight line from `a` to `b`.

    Every model is interpolated from both ends anew, by :func:`pymerge.wise_ft`. Networks with batch normalisation need their statistics
    recomputed in `evaluate` (Jordan et al. 2023); those with layer norms do not.

    Args:
        a, b: models of one kind, as :func:`pymerge.wise_ft` takes them.
        evaluate: model (for modules a state dict) -> loss, lower is better; on the same held-out batches in the same order each time.
        alphas: so many evenly spaced, or a list; 0 and 1 are always among them.
        refine: evaluations more, around the highest point: each halves the wider of the two gaps beside it.

    Raises:
        ValueError: alphas outside [0, 1] or fewer than 2, or a loss that is NaN.
    """
    if isinstance(alphas, int):
        if alphas < 2:
            raise ValueError(f"alphas is {alphas}; both ends are evaluated, so at least 2")
        wanted = [i / (alphas - 1) for i in range(alphas)]
    else:
        wanted = sorted({0.0, 1.0, *map(float, alphas)})
        if wanted[0] < 0 or wanted[-1] > 1:
            raise ValueError(f"alphas reach from {wanted[0]} to {wanted[-1]}; they interpolate, so from 0 to 1")
    losses: dict[float, float] = {}

    def measure(alpha: float) -> None:
        losses[alpha] = float(evaluate(wise_ft(a, b, alpha=alpha)))
        if math.isnan(losses[alpha]):
            raise ValueError(f"the loss at alpha {alpha:g} is NaN")

    for alpha in wanted:
        measure(alpha)
    for _ in range(refine):
        curve = _curve(losses)
        top = max(range(len(curve.alphas)), key=lambda i: curve.heights()[i])
        sides = [(curve.alphas[i], curve.alphas[i + 1]) for i in (top - 1, top) if 0 <= i < len(curve.alphas) - 1]
        low, high = max(sides, key=lambda side: side[1] - side[0])
        measure((low + high) / 2)
    return _curve(losses)


def _curve(losses: Mapping[float, float]) -> InterpolationCurve:
    alphas = tuple(sorted(losses))
    return InterpolationCurve(alphas, tuple(losses[alpha] for alpha in alphas))


def loss_barrier(a: Any, b: Any, evaluate: Callable[[Any], float], *, kind: str = "linear", alphas: int | Sequence[float] = 11) -> float:
    """:meth:`InterpolationCurve.barrier` of :func:`interpolate_eval`."""
    return interpolate_eval(a, b, evaluate, alphas).barrier(kind)


@dataclass(frozen=True)
class BarrierMatrix:
    """What :func:`barrier_matrix` found.

    Attributes:
        models: names.
        curves: by pair of indices i < j.
        losses: of the models themselves.
        barycentre: loss of the average of all models minus their mean loss.
    """

    models: tuple[str, ...]
    curves: Mapping[tuple[int, int], InterpolationCurve]
    losses: tuple[float, ...]
    barycentre: float

    def barriers(self, kind: str = "linear") -> list[list[float]]:
        """Symmetric, zeros on the diagonal."""
        every = range(len(self.models))
        return [[0.0 if i == j else self.curves[min(i, j), max(i, j)].barrier(kind) for j in every] for i in every]


def barrier_matrix(models: Any, evaluate: Callable[[Any], float], *, alphas: int | Sequence[float] = 11) -> BarrierMatrix:
    """Barriers between each two of several models, and at the average of all; arguments as :func:`interpolate_eval` has them."""
    from ..merge_methods.linear import model_soup

    names, given = zip(*named(models).items())
    if len(given) < 2:
        raise ValueError("one model has no barrier; pass at least two")
    curves = {(i, j): interpolate_eval(given[i], given[j], evaluate, alphas) for i in range(len(given)) for j in range(i + 1, len(given))}
    losses = (*(curves[i, len(given) - 1].losses[0] for i in range(len(given) - 1)), curves[0, len(given) - 1].losses[-1])
    centre = float(evaluate(model_soup(list(given))))
    return BarrierMatrix(names, curves, losses, centre - sum(losses) / len(losses))
