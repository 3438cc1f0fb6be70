"""PEFT's merge utilities on fp32 deltas; adding the base is what a caller has to do."""

from __future__ import annotations

from importlib.metadata import version

import torch
from peft.utils import merge_utils

from ..inputs import Inputs
from ..methods import SCALE
from . import Rival
from .naive import each

__all__ = ["rivals"]


def rivals(method: str, inputs: Inputs, density: float) -> list[Rival]:
    if method not in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        return []
    # Its dare_ties averages over the models that agree, where the others add them up.
    if method == "dare_ties":
        return []
    weights = torch.full((len(inputs.models),), SCALE if method == "task_arithmetic" else 1.0)

    def merge(base, models, average):
        deltas = [x.float() - base.float() for x in models]
        arguments = (deltas, weights) if method == "task_arithmetic" else (deltas, weights, density)
        return (base.float() + getattr(merge_utils, method)(*arguments)).to(base.dtype)

    need = 52 * len(inputs.models)  # a quarter more than was measured for TIES
    random, least = method.startswith("dare"), 0.95 if method == "ties" else 0.999
    return [Rival(f"PEFT {version('peft')}", lambda: each(inputs, merge), need, random=random, least=least)]
