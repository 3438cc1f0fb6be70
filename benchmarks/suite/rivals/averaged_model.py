"""torch's own moving averages: AveragedModel with its multi-tensor function, and torch._foreach_lerp_ on its own.

AveragedModel keeps the average in the model's dtype, so for bf16 models it gets fp32 copies of them; making these is timed, as pymerge
reads bf16 itself.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..inputs import Inputs, tensors
from ..methods import DECAY
from . import Rival

__all__ = ["rivals"]


class _Module(nn.Module):
    def __init__(self, values: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(x, requires_grad=False) for x in values)


def rivals(method: str, inputs: Inputs, density: float) -> list[Rival]:
    if method != "ema":
        return []
    model, start = tensors(inputs.models[0]), [x.clone() for x in tensors(inputs.out)]
    average = [x.clone() for x in start]

    def foreach() -> object:
        torch._foreach_lerp_(average, [x.to(y.dtype) for x, y in zip(model, average)], 1 - DECAY)
        return average

    averaged = AveragedModel(_Module(start), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.n_averaged.fill_(1)  # the first update only copies
    current = _Module([x.float() for x in model])

    def update() -> object:
        for x, y in zip(model, current.weights):
            if x.dtype != y.dtype:
                y.copy_(x)
        averaged.update_parameters(current)
        return list(averaged.module.weights)

    def reset() -> None:
        for values in (average, averaged.module.weights):
            for x, y in zip(values, start):
                x.copy_(y)

    return [Rival("AveragedModel", update, 16, prepare=reset), Rival("torch._foreach_lerp_", foreach, 16, prepare=reset)]
