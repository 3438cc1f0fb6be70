"""MagMax: of each element keep the delta of the model that changed it most (Marczak et al. 2024, arXiv:2407.06322)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import finite
from ..tree import Paired
from .flat import Flat, check_inputs, choose
from .fused import merge_each
from .recipe_parameters import LAMBDA
from .registry import register_method

__all__ = ["magmax"]


def magmax(
    base: Any,
    models: Sequence[Any],
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """``out = base + scale * delta_p``, where for each element p is the model whose delta is largest in magnitude.

    Args:
        base, models, dtype, out, check_finite: as in :func:`pymerge.ties`. Of equal magnitudes the first model's counts.
        scale: multiplies the merged delta (the paper's lambda, 0.5 in its experiments).

    Returns and raises: as :func:`pymerge.ties`.
    """
    pairs = Paired(base, models, needs_base="magmax")
    return merge_each(pairs, _tensor, scale=finite(scale, "scale"), dtype=dtype, out=out, check_finite=check_finite)


@register_method(
    "magmax",
    base="required",
    summary="per element the delta of largest magnitude",
    source="Marczak et al. 2024, arXiv:2407.06322, section 4",
    parameters=(LAMBDA,),
)
def _tensor(base: Tensor, models: list[Tensor], *, scale, name, dtype, out, check_finite) -> Tensor:
    if check_finite:
        check_inputs(base, models, name)
    flat = Flat(base, models)
    factor = flat.scalar(scale)

    def largest(at: slice) -> Tensor:
        best, *rest = flat.deltas(at)
        for delta in rest:
            best = choose(delta.abs() > best.abs(), delta, best)
        return flat.base(at) + best * factor

    return flat.write(largest, dtype, out)
