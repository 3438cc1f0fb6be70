"""The papers' formulas in torch (benchmarks/baselines.py), for state dicts tensor by tensor."""

from __future__ import annotations

from benchmarks import baselines

from ..inputs import Inputs
from ..methods import ALPHA, DECAY, SCALE
from . import Rival

__all__ = ["each", "formula", "rivals"]

# Bytes per element and model, most at the same time: fp32 deltas, their stack, masks and products; topk's pairs on top in TIES.
_BYTES = {"ties": 32, "dare_linear": 20, "dare_ties": 28}


def formula(method: str, density: float):
    """The formula of one tensor: (base, models, average) -> merged; None for what has none."""
    return {
        "linear": lambda base, models, average: baselines.linear(models),
        "task_arithmetic": lambda base, models, average: baselines.task_arithmetic(base, models, SCALE),
        "wise_ft": lambda base, models, average: baselines.wise_ft(base, models[0], ALPHA),
        "ema": lambda base, models, average: baselines.ema(average, models[0], DECAY),
        "slerp": lambda base, models, average: baselines.slerp(base, models[0], ALPHA),
        "ties": lambda base, models, average: baselines.ties(base, models, density),
        "dare_linear": lambda base, models, average: baselines.dare_linear(base, models, density),
        "dare_ties": lambda base, models, average: baselines.dare_ties(base, models, density),
    }.get(method)


def each(inputs: Inputs, function):
    """`function` of each tensor's base, models and average, flat; a tensor or a state dict, as the inputs are."""
    if inputs.layout == "one":
        return function(inputs.base, inputs.models, inputs.out)
    merged = {}
    for name, out in inputs.out.items():
        result = function(inputs.base[name].view(-1), [x[name].view(-1) for x in inputs.models], out.view(-1))
        merged[name] = result.view(out.shape)
    return merged


def rivals(method: str, inputs: Inputs, density: float) -> list[Rival]:
    if method == "diagnose":
        return [Rival("separate torch operations", lambda: _diagnosis(inputs), 30 * len(inputs.models))] if inputs.layout == "one" else []
    function = formula(method, density)
    need = _BYTES.get(method, 16) * (len(inputs.models) + 1)
    # Its slerp takes the angle from fp32 sums in another order.
    least = 0.99 if method == "slerp" else 0.95 if method == "ties" else 0.999
    return [Rival("naive torch", lambda: each(inputs, function), need, random=method.startswith("dare"), least=least)]


def _diagnosis(inputs: Inputs) -> list:
    return baselines.diagnosis(inputs.base, inputs.models)
