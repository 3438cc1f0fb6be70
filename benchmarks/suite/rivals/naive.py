"""The papers' formulas in torch (benchmarks/baselines.py), for state dicts tensor by tensor."""

from __future__ import annotations

from benchmarks import baselines

from ..inputs import Inputs
from ..methods import ALPHA, DECAY, SCALE
from . import Rival

__all__ = ["each", "formula", "rivals"]

# Bytes per element and model that are resident at the peak, a quarter more than was measured: fp32 deltas, their stack, masks, products.
_BYTES = {
    "linear": 10, "task_arithmetic": 20, "wise_ft": 24, "ema": 20, "slerp": 40, "ties": 40, "dare_linear": 32, "dare_ties": 36,
    "diagnose": 55,
}  # fmt: skip


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
    need = _BYTES[method] * len(inputs.models)
    if method == "diagnose":
        return (
            [Rival("separate torch operations", lambda: baselines.diagnosis(inputs.base, inputs.models), need)]
            if inputs.layout == "one"
            else []
        )
    function = formula(method, density)
    # Its slerp takes the angle from fp32 sums in another order.
    least = 0.99 if method == "slerp" else 0.95 if method == "ties" else 0.999
    return [Rival("naive torch", lambda: each(inputs, function), need, random=method.startswith("dare"), least=least)]
