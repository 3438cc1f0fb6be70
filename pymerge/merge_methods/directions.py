"""Averages of directions: each tensor is one vector, and the result is a weighted sum of the models whose weights follow from their angles.

Every method here needs nothing of the models but the dot products of their deltas. So it takes two passes over memory, one for those
products (:meth:`Flat.gram`) and one for the fused weighted sum, however many steps the method has in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..conventions import Convention
from ..spec import MergeSpec
from .flat import Flat, check_inputs

__all__ = ["Gram", "merge_by_angles"]

_SUM = Convention(divisor="none")

Gram = Sequence[Sequence[float]]


def merge_by_angles(
    base: Tensor | None,
    models: list[Tensor],
    coefficients: Callable[[Gram], Sequence[float]],
    *,
    name: str,
    dtype: torch.dtype,
    out: Tensor | None,
    check_finite: bool,
) -> Tensor:
    """base + sum_i(c_i * delta_i), c = `coefficients` of the deltas' dot products, fp64."""
    gram = Flat(base, models).gram()
    if check_finite and not all(math.isfinite(g) for row in gram for g in row):  # a NaN or an infinity shows in the sums
        check_inputs(base, models, name)
    spec = MergeSpec(tuple(coefficients(gram)), (1.0,) * len(models), convention=_SUM)
    return ops.merge(base, models, spec, name=name, dtype=dtype, out=out, check_finite=False)
