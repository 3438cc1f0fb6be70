"""What data shows that weights alone do not: drift of the predictions, gradients that pull apart, tasks that do not add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.divergence import kl_divergence

__all__ = ["GradientConflict", "composition_error", "gradient_conflict", "kl_drift"]


@torch.no_grad()
def kl_drift(model: nn.Module, base: nn.Module, batches: Iterable[Any], direction: str = "forward", *, ignore_index: int = -100) -> float:
    """Mean divergence between a tuned model's predictions and its base's, in nats per token.

    The forward divergence on the new task is what explained forgetting best in Shenfeld et al. 2025 (arXiv:2509.04259).

    Args:
        model, base: modules that give logits, or an object with ``.logits``, for a batch. Run in evaluation mode and put back.
        batches: mappings (called with keywords, ``labels`` left out) or single tensors. Tokens whose label is `ignore_index` or whose
            ``attention_mask`` is 0 do not count; every other token of all batches counts alike.
        direction: ``"forward"``: KL(base || model); ``"reverse"`` or ``"jsd"``, as :func:`pymerge.kl_divergence` has them.

    Raises:
        ValueError: no token counts, or logits do not fit.
    """
    total, tokens = 0.0, 0.0
    modes = [(m, m.training) for m in (model, base)]
    try:
        for m, _ in modes:
            m.eval()
        for batch in batches:
            logits, ref_logits = _logits(model, batch), _logits(base, batch)
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = None if mask is None else mask.bool()
            kept = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
            kept = kept if labels is None else kept & (labels != ignore_index)
            total += float(kl_divergence(logits, ref_logits, direction=direction, mask=kept, reduction="sum"))
            tokens += float(kept.sum())
    finally:
        for m, training in modes:
            m.train(training)
    if not tokens:
        raise ValueError("no token counts: there are no batches, or every token is masked")
    return total / tokens


def _logits(model: nn.Module, batch: Any) -> Tensor:
    out = model(**{k: v for k, v in batch.items() if k != "labels"}) if isinstance(batch, Mapping) else model(batch)
    return getattr(out, "logits", out)


@dataclass(frozen=True)
class GradientConflict:
    """What :func:`gradient_conflict` found.

    Attributes:
        cosine: between both gradients as one vector each; NaN where one is zero.
        dot: their dot product; below 0, a step for one task is a step back for the other to first order.
        conflicting: share of the tensors whose own dot product is below 0.
        cosines: by tensor.
    """

    cosine: float
    dot: float
    conflicting: float
    cosines: Mapping[str, float]


def gradient_conflict(grads_a: Any, grads_b: Any) -> GradientConflict:
    """Do two losses pull the same weights in opposite directions? A read-out only; nothing is projected.

    Args:
        grads_a, grads_b: mappings name -> gradient, or modules after ``backward()``. Tensors that have a gradient in one of them only are
            left out of the share and of the cosines, and count as 0 in the dot product.

    Raises:
        ValueError: shapes differ, or no tensor has both gradients.
    """
    a, b = _gradients(grads_a), _gradients(grads_b)
    square_a = square_b = dot = 0.0
    cosines: dict[str, float] = {}
    negative = 0
    for name in {**a, **b}:
        x, y = a.get(name), b.get(name)
        xx, yy = (0.0 if t is None else float(t.double().square().sum()) for t in (x, y))
        square_a, square_b = square_a + xx, square_b + yy
        if x is None or y is None:
            continue
        if x.shape != y.shape:
            raise ValueError(f"{name!r} is {tuple(x.shape)} in one and {tuple(y.shape)} in the other")
        xy = float((x.double() * y.double()).sum())
        dot, negative = dot + xy, negative + (xy < 0)
        cosines[name] = xy / math.sqrt(xx * yy) if xx and yy else math.nan
    if not cosines:
        raise ValueError("no tensor has a gradient in both")
    norm = math.sqrt(square_a * square_b)
    return GradientConflict(dot / norm if norm else math.nan, dot, negative / len(cosines), cosines)


def _gradients(given: Any) -> dict[str, Tensor]:
    if isinstance(given, nn.Module):
        return {name: p.grad for name, p in given.named_parameters() if p.grad is not None}
    return {name: g for name, g in given.items() if g is not None}


def composition_error(
    models: Iterable[Callable[[Any], Tensor]], merged: Callable[[Any], Tensor], batches_by_task: Iterable[Iterable[Any]]
) -> list[float]:
    """Per task, the share of its inputs on which the merged model predicts another class than the task's own model: the weight
    disentanglement error of Ortiz-Jimenez et al. 2023 (arXiv:2305.12827, eq. 6) with the distance of disagreement.

    Args:
        models: input -> logits ``[..., classes]``, one per task.
        merged: likewise.
        batches_by_task: the inputs of each task.
    """
    errors = []
    for model, batches in zip(models, batches_by_task, strict=True):
        different = total = 0
        for batch in batches:
            with torch.no_grad():
                other = model(batch).argmax(-1) != merged(batch).argmax(-1)
            different, total = different + int(other.sum()), total + other.numel()
        if not total:
            raise ValueError("a task has no inputs")
        errors.append(different / total)
    return errors
