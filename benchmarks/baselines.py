"""The methods as people write them in torch: the papers' formulas, a line each, on stacked fp32 deltas.

They are the yardstick for speed-ups, and the check of the full-size results: none of pymerge's code is in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def deltas(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.float() - base.float() for x in models])


def linear(models: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.float() for x in models]).mean(0).to(models[0].dtype)


def task_arithmetic(base: Tensor, models: Sequence[Tensor], scale: float) -> Tensor:
    return (base.float() + scale * deltas(base, models).sum(0)).to(base.dtype)


def trim(delta: Tensor, density: float) -> Tensor:
    _, index = delta.abs().topk(int(density * delta.numel()))
    mask = torch.zeros_like(delta)
    mask[index] = 1
    return delta * mask


def agree_and_average(t: Tensor) -> Tensor:
    """Mean over the models whose sign is that of the sum (TIES, steps 2 and 3)."""
    sign = torch.where(t.sum(0) >= 0, 1.0, -1.0)
    keep = t.sign() == sign
    return (t * keep).sum(0) / keep.sum(0).clamp(min=1)


def ties(base: Tensor, models: Sequence[Tensor], density: float) -> Tensor:
    trimmed = torch.stack([trim(d, density) for d in deltas(base, models)])
    return (base.float() + agree_and_average(trimmed)).to(base.dtype)


def bernoulli_masks(like: Tensor, density: float) -> Tensor:
    return torch.bernoulli(torch.full_like(like, density))


def dare_linear(base: Tensor, models: Sequence[Tensor], density: float, masks: Tensor | None = None) -> Tensor:
    d = deltas(base, models)
    dropped = d * (bernoulli_masks(d, density) if masks is None else masks) / density
    return (base.float() + dropped.sum(0)).to(base.dtype)


def dare_ties(base: Tensor, models: Sequence[Tensor], density: float, masks: Tensor | None = None) -> Tensor:
    d = deltas(base, models)
    t = d * (bernoulli_masks(d, density) if masks is None else masks) / density
    sign = torch.where(t.sum(0) >= 0, 1.0, -1.0)
    return (base.float() + (t * (t.sign() == sign)).sum(0)).to(base.dtype)


def wise_ft(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    return ((1 - alpha) * base.float() + alpha * tuned.float()).to(base.dtype)


def ema(average: Tensor, model: Tensor, decay: float) -> Tensor:
    return (decay * average.float() + (1 - decay) * model.float()).to(average.dtype)


def slerp(a: Tensor, b: Tensor, t: float, compute: torch.dtype = torch.float32) -> Tensor:
    x, y = a.to(compute), b.to(compute)
    cosine = torch.dot(x / x.norm(), y / y.norm()).clamp(-1, 1).item()
    if abs(cosine) > 0.9995:
        return ((1 - t) * x + t * y).to(a.dtype)
    angle = math.acos(cosine)
    return ((math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)).to(a.dtype)


def diagnosis(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """The measures of pymerge.diagnose_ops, one torch operation at a time, with |delta| > 0.001 kept."""
    deltas = [m.float() - base.float() for m in models]
    found = [d.double().square().sum() for d in deltas] + [d.abs().sum(dtype=torch.float64) for d in deltas]
    found += [(a.double() * b.double()).sum() for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    found += [torch.stack(deltas).sum(0).abs().sum(dtype=torch.float64), base.double().square().sum()]
    kept = [d.abs() > 1e-3 for d in deltas]
    positive, negative = (torch.stack([k & (f * d > 0) for k, d in zip(kept, deltas)]) for f in (1, -1))
    found += [(positive.any(0) & negative.any(0)).sum(), (torch.stack(kept).sum(0) >= 2).sum()]
    found += [(kept[i] & kept[j]).sum() for i in range(len(kept)) for j in range(i + 1, len(kept))]
    return found
