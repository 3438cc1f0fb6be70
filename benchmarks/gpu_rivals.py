"""What torch alone gives on a GPU: the naive formulas, and the best that a skilled user gets (any selection, the rest compiled)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import baselines
import torch
from torch import Tensor


def _naive(method: str, base: Tensor, models: Sequence[Tensor]) -> Callable[[], Tensor]:
    return {
        "soup": lambda: baselines.linear(models),
        "task_arithmetic": lambda: baselines.task_arithmetic(base, models, 0.4),
        "wise_ft": lambda: baselines.wise_ft(base, models[0], 0.3),
        "dare_linear": lambda: baselines.dare_linear(base, models, 0.5),
        "dare_ties": lambda: baselines.dare_ties(base, models, 0.5),
        "ties": lambda: baselines.ties(base, models, 0.2),
        "ema": lambda: baselines.ema(base.float(), models[0], 0.999),
    }[method]


# Elementwise parts as one compiled kernel each. TIES trims by a threshold, which is all that elementwise code can do.


def _agree(base: Tensor, models: Sequence[Tensor], thresholds: Sequence[Tensor]) -> Tensor:
    b = base.float()
    kept = []
    for x, threshold in zip(models, thresholds):
        d = x.float() - b
        kept.append(torch.where(d.abs() >= threshold, d, 0.0))
    return (b + baselines.agree_and_average(torch.stack(kept))).to(base.dtype)


def _threshold(base: Tensor, x: Tensor, density: float, how: str) -> Tensor:
    magnitude = (x.float() - base.float()).abs()
    k = int(density * magnitude.numel())
    if how == "sort":
        return magnitude.sort(descending=True).values[k - 1]
    return magnitude.topk(k, sorted=False).values.min()


def _best(method: str, base: Tensor, models: Sequence[Tensor]) -> dict[str, Callable[[], Tensor]]:
    if method == "ties":
        agree = torch.compile(_agree)
        return {how: lambda how=how: agree(base, models, [_threshold(base, x, 0.2, how) for x in models]) for how in ("topk", "sort")}
    function = torch.compile(lambda b, xs: _naive(method, b, xs)())
    return {"compiled": lambda: function(base, models)}


def times(method: str, base: Tensor, models: Sequence[Tensor], clock, rounds: int) -> dict:
    """Median milliseconds of the naive and of the best torch version, None where one does not run (memory, compiler)."""
    torch._dynamo.reset()  # each method and dtype is compiled anew; the limit on recompilations is not for this
    result: dict = {"naive_ms": None, "best_torch_ms": None, "best_torch": None}
    candidates = {"naive": _naive(method, base, models), **_best(method, base, models)}
    for name, run in candidates.items():
        try:
            median = statistics.median(clock.interleaved({name: run}, rounds)[name])
        except Exception as error:  # out of memory, or no compiler on the machine: a rival that does not run has no time
            print(f"  {method}: {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
            continue
        if name == "naive":
            result["naive_ms"] = median
        if result["best_torch_ms"] is None or median < result["best_torch_ms"]:
            result["best_torch_ms"], result["best_torch"] = median, name
    return result
