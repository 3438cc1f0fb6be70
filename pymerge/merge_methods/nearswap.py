"""NearSwap: take over a second model where it is near, move towards it by a fixed step elsewhere, as in mergekit (by alchemonaut)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import finite
from ..tree import Paired
from .flat import Flat, check_inputs, choose
from .fused import merge_each
from .registry import Parameter, register_method

__all__ = ["nearswap"]


def nearswap(
    base: Any,
    model: Any,
    *,
    t: float,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """``base + w * (model - base)`` with ``w = min(t / |model - base|, 1)`` per element.

    That is: the model's element, exactly, where it is at most t away, and the base's moved by t towards it where it is not.

    Args:
        base, model: two tensors, two mappings name -> tensor or two nn.Modules.
        t: a distance between weights, at least 0.
        dtype, out, check_finite: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`; ValueError also for a negative t.
    """
    pairs = Paired(base, [model], labels=("base", "model"), needs_base="nearswap")
    return merge_each(pairs, _tensor, t=finite(t, "t"), dtype=dtype, out=out, check_finite=check_finite)


@register_method(
    "nearswap",
    base="required",
    max_models=1,
    summary="the model where it is near the base, a step towards it elsewhere",
    source="mergekit; huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    parameters=(Parameter("t", recipe="t", kind=float, doc="distance up to which the model is taken"),),
)
def _tensor(base: Tensor, models: list[Tensor], *, t, name, dtype, out, check_finite) -> Tensor:
    if not t >= 0:
        raise ValueError(f"t is {t}; it is a distance between weights, at least 0")
    if check_finite:
        check_inputs(base, models, name)
    flat = Flat(base, models)
    step = flat.scalar(t)

    def near(at: slice) -> Tensor:
        (delta,), (model,) = flat.deltas(at), flat.models(at)
        return choose(delta.abs() <= step, model, flat.base(at) + torch.copysign(step, delta))

    return flat.write(near, dtype, out)
