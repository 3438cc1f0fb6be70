"""The best that torch alone gives: any of its selections, and the rest compiled, or eager without spare copies; the fastest counts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import baselines

from ..inputs import Inputs
from ..methods import ALPHA, DECAY, SCALE
from . import Rival
from .naive import each, formula

__all__ = ["rivals"]


@functools.cache
def _compiled(method: str, density: float):
    """The naive formula as one function; the compiler fuses what is elementwise in it."""
    return torch.compile(formula(method, density), dynamic=False)


def _agree(base: Tensor, models: list[Tensor], thresholds: list[Tensor]) -> Tensor:
    """TIES, given thresholds: which of the elements at the threshold are kept is then not open to choice, all are."""
    b, kept = base.float(), []
    for x, threshold in zip(models, thresholds):
        d = x.float() - b
        kept.append(torch.where(d.abs() >= threshold, d, 0.0))
    return (b + baselines.agree_and_average(torch.stack(kept))).to(base.dtype)


_compiled_agree = functools.cache(lambda: torch.compile(_agree, dynamic=False))


def threshold(base: Tensor, x: Tensor, density: float, how: str) -> Tensor:
    """The k-th largest magnitude of a delta."""
    magnitude = (x.float() - base.float()).abs_()
    k = int(density * magnitude.numel())
    if how == "kthvalue":
        return magnitude.kthvalue(magnitude.numel() - k + 1).values
    if how == "topk":
        return magnitude.topk(k, sorted=False).values.min()
    return magnitude.sort(descending=True).values[k - 1]


def _by_threshold(how: str, density: float, agree):
    return lambda base, models, average: agree(base, models, [threshold(base, x, density, how) for x in models])


def _eager(method: str):
    """Without spare copies, in place where that gives the same; None where there is no better way than the formula's."""

    def linear(base, models, average):
        total = models[0].float()
        for x in models[1:]:
            total.add_(x)
        return total.div_(len(models)).to(models[0].dtype)

    def task_arithmetic(base, models, average):
        b = base.float()
        total = models[0] - b
        for x in models[1:]:
            total.add_(x).sub_(b)
        return total.mul_(SCALE).add_(b).to(base.dtype)

    return {
        "linear": linear,
        "task_arithmetic": task_arithmetic,
        "wise_ft": lambda base, models, average: torch.lerp(base.float(), models[0].float(), ALPHA).to(base.dtype),
        "ema": lambda base, models, average: torch.lerp(average, models[0].to(average.dtype), 1 - DECAY),
    }.get(method)


def rivals(method: str, inputs: Inputs, density: float) -> list[Rival]:
    need = 20 * (len(inputs.models) + 1)
    if method == "ties":
        # Hundreds of shapes would be compiled for a state dict, so it stays eager there.
        one, some = inputs.layout == "one", [torch.zeros(())] * len(inputs.models)
        agree, rest = (_compiled_agree(), "compiled") if one else (_agree, "eager")
        first = (lambda: agree(inputs.base, inputs.models, some)) if one else None
        return [
            Rival(f"{how}, {rest}", lambda how=how: each(inputs, _by_threshold(how, density, agree)), need, least=0.95, prepare=first)
            for how in ("kthvalue", "topk", "sort")
        ]
    if formula(method, density) is None or inputs.layout != "one":
        return []
    random, least = method.startswith("dare"), 0.99 if method == "slerp" else 0.999
    compiled = functools.partial(each, inputs, _compiled(method, density))
    found = [Rival("compiled", compiled, need, random, least, prepare=compiled)]
    if eager := _eager(method):
        found.append(Rival("eager, in place", lambda: each(inputs, eager), need, random, least))
    return found
