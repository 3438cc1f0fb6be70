"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TeacherEnsemble"]


class TeacherEnsemble:
    """Logits of several teachers combined into those of one, for :func:`distillation_loss`.

    Args:
        teachers: modules or functions that give logits, or an object with ``.logits``; run without gradients. Put modules in evaluation
            mode.
        weights: one per teacher, at least 0, not all 0; equal by default. Scaled to sum to 1.
        mode: ``"prob_mean"``: the mean of the probabilities (the mixture of the teachers); ``"logit_mean"``: the mean of the logits
            (their product: what all agree on); ``"route"``: each sequence has one teacher, given by ``route``.

    Raises:
        ValueError: no teachers, or weights that do not fit.
    """

    def __init__(self, teachers: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None, mode: str = "prob_mean") -> None:
        if not teachers:
            raise ValueError("there is no teacher")
        if mode not in ("prob_mean", "logit_mean", "route"):
            raise ValueError(f"mode is {mode!r}; choose 'prob_mean', 'logit_mean' or 'route'")
        given = [1.0] * len(teachers) if weights is None else [float(w) for w in weights]
        if len(given) != len(teachers) or min(given) < 0 or not sum(given) > 0:
            raise ValueError(f"weights are {given} for {len(teachers)} teachers; give each at least 0, and not all 0")
        if mode == "route" and weights is not None:
            raise ValueError("mode 'route' chooses one teacher for each sequence; it has no weights")
        self.teachers, self.mode = tuple(teachers), mode
        self.weights = tuple(w / sum(given) for w in given)

    @torch.no_grad()
    def logits(self, *args: Any, route: Tensor | None = None, temperature: float = 1.0, **kwargs: Any) -> Tensor:
        """Combined logits ``[batch, ..., vocab]`` for a batch, fp32 (of ``"route"``: the teachers' dtype).

        Args:
            args, kwargs: what the teachers are called with.
            route: integers ``[batch]``: the teacher of each sequence; only those that are named are run, on their sequences.
            temperature: the divergence's. The mean of probabilities is taken there, and the result is for the same temperature.
        """
        if (self.mode == "route") != (route is not None):
            raise ValueError("route= goes with mode 'route', which needs it")
        if route is not None:
            return self._routed(route, args, kwargs)
        combined: Tensor | None = None
        for teacher, weight in zip(self.teachers, self.weights):
            if weight == 0:
                continue
            scaled = _logits_of(teacher, args, kwargs).float() / temperature
            if self.mode == "logit_mean":
                part = weight * scaled
                combined = part if combined is None else combined.add_(part)
            else:
                part = torch.log_softmax(scaled, -1).add_(torch.tensor(weight, dtype=torch.float64).log().item())
                combined = part if combined is None else torch.logaddexp(combined, part)
        return combined * temperature

    def _routed(self, route: Tensor, args: tuple, kwargs: dict) -> Tensor:
        batch = len(route)
        known = set(route.tolist())
        outside = sorted(known - set(range(len(self.teachers))))
        if outside:
            raise ValueError(f"route names teacher {outside[0]}; there are {len(self.teachers)}, numbered from 0")
        result: Tensor | None = None
        for number in sorted(known):
            rows = torch.nonzero(route == number).reshape(-1)
            own_kwargs = {k: _rows(v, rows, batch) for k, v in kwargs.items()}
            own = _logits_of(self.teachers[number], [_rows(a, rows, batch) for a in args], own_kwargs)
            if result is None:
                result = own.new_empty(batch, *own.shape[1:])
            result[rows] = own.to(result.dtype)
        return result


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value


def _logits_of(teacher: Callable[..., Any], args: Sequence, kwargs: dict) -> Tensor:
    output = teacher(*args, **kwargs)
    return output if isinstance(output, Tensor) else output.logits
