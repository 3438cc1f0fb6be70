"""The Karcher (Riemannian) mean of the models' directions (Karcher 1977, doi:10.1002/cpa.3160300502; for models arXiv:2603.04972)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import finite, integer
from ..tree import Paired
from .directions import Gram, merge_by_angles
from .fused import merge_each
from .registry import Parameter, register_method

__all__ = ["karcher"]


def karcher(
    models: Sequence[Any],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """The point of the sphere with the smallest sum of squared angles to the models, at the models' mean length.

    Each tensor is one vector. From the normalised mean of the directions u_i the point m moves by ``exp_m(mean_i log_m(u_i))`` until that
    step is shorter than `tol` radians. Tensors of zeros have no direction and count in the mean length alone; a direction opposite to m has
    no logarithm and does not count in that step.

    Args:
        models: list of tensors, mappings name -> tensor or nn.Modules, all of one kind.
        max_iter: steps at most, 0 or more.
        tol: length of the last step, and of a mean of directions that cancel (then m starts at the first model).
        dtype, out, check_finite: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`; ValueError also for a negative max_iter or tol.
    """
    pairs = Paired(None, models)
    max_iter, tol = integer(max_iter, "max_iter"), finite(tol, "tol")
    return merge_each(pairs, _tensor, max_iter=max_iter, tol=tol, dtype=dtype, out=out, check_finite=check_finite)


def _coefficients(gram: Gram, max_iter: int, tol: float) -> list[float]:
    """Vectors are held as coefficients of the unit vectors u_i, whose dot products are `cosines`."""
    count = len(gram)
    lengths = [math.sqrt(gram[i][i]) for i in range(count)]
    known = [i for i in range(count) if lengths[i] > 0]
    if not known or not all(map(math.isfinite, lengths)):
        return [1.0 / count] * count
    cosines = torch.tensor([[gram[i][j] / (lengths[i] * lengths[j]) for j in known] for i in known], dtype=torch.float64)
    cosines.fill_diagonal_(1.0)

    def length(v: Tensor) -> float:
        return math.sqrt(max(float(v @ cosines @ v), 0.0))

    m = torch.full((len(known),), 1.0 / len(known), dtype=torch.float64)
    if length(m) <= tol:
        m = torch.zeros_like(m)
        m[0] = 1.0
    m = m / length(m)
    for _ in range(max_iter):
        step = torch.zeros_like(m)
        for i, cosine in enumerate((cosines @ m).clamp(-1.0, 1.0).tolist()):
            angle = math.acos(cosine)
            sine = math.sin(angle)
            if sine < _NO_SINE and cosine < 0:
                continue
            log = -cosine * m
            log[i] += 1.0
            step += (angle / sine if sine > _NO_SINE else 1.0) / len(known) * log
        way = length(step)
        if way <= tol:
            break
        m = math.cos(way) * m + math.sin(way) / way * step
        m = m / length(m)
    size = sum(lengths) / count
    coefficients = [0.0] * count
    for i, c in zip(known, m.tolist()):
        coefficients[i] = size * c / lengths[i]
    return coefficients


_NO_SINE = 1e-8  # closer to a line than this, an arc cosine has no digits left


@register_method(
    "karcher",
    base="model",
    summary="Riemannian mean of the models' directions, at their mean length",
    source="Karcher 1977, doi:10.1002/cpa.3160300502; arXiv:2603.04972",
    parameters=(
        Parameter("max_iter", recipe="max_iter", kind=int, default=10, doc="steps at most"),
        Parameter("tol", recipe="tol", kind=float, default=1e-5, doc="length in radians of a step that is the last"),
    ),
)
def _tensor(base: None, models: list[Tensor], *, max_iter, tol, name, dtype, out, check_finite) -> Tensor:
    if max_iter < 0 or not tol >= 0:
        raise ValueError(f"max_iter is {max_iter} and tol {tol}; both must be at least 0")

    def coefficients(gram: Gram) -> list[float]:
        return _coefficients(gram, max_iter, tol)

    return merge_by_angles(None, models, coefficients, name=name, dtype=dtype, out=out, check_finite=check_finite)
