"""Barycentric interpolation of several models on a sphere, as in mergekit (goddard.blog/posts/multislerp-wow-what-a-cool-idea)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import finite, per_model
from ..tree import Paired
from .directions import Gram, merge_by_angles
from .fused import merge_each, weights_that_sum
from .recipe_parameters import WEIGHT
from .registry import Parameter, register_method

__all__ = ["multislerp"]


def multislerp(
    models: Sequence[Any],
    *,
    base: Any = None,
    weights: float | Sequence[float] | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """The models' weighted mean direction, at their weighted mean length: ``out = base + sum_j(w_j |d_j|) * m / |m|``.

    ``m = sum_i(w_i d_i / |d_i|)`` and ``d_i = models[i] - base``; without a base the models are vectors from zero. Each tensor is one
    vector; one of zeros has no direction and adds no length. Where the directions cancel, ``|m| <= eps``, the result is the straight
    weighted sum, ``base + sum_i(w_i d_i)``. (mergekit goes on from m / |m| along the tangent ``sum_i(w_i (u_i - (u_i·m) m))``, which is
    zero at that point.)

    Args:
        models: list of tensors, mappings name -> tensor or nn.Modules, all of one kind.
        base: of the same kind, or None.
        weights: a number or one per model; 1 each by default.
        normalize_weights: divide the weights by their sum.
        eps: the length of m, a number between 0 and 1 for normalised weights, up to which there is no mean direction.
        dtype, out, check_finite: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`; ValueError also for a negative eps, and when weights that sum to zero are to be normalised.
    """
    pairs = Paired(base, models)
    weights = per_model(weights, pairs.count, "weights")
    return merge_each(
        pairs, _tensor, weights=weights, normalize_weights=normalize_weights, eps=finite(eps, "eps"), dtype=dtype, out=out,
        check_finite=check_finite,
    )  # fmt: skip


def _coefficients(gram: Gram, weights: Sequence[float], eps: float) -> list[float]:
    lengths = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    units = [w / length if length > 0 else 0.0 for w, length in zip(weights, lengths)]  # m in terms of the d_i
    square = sum(u * v * g for u, row in zip(units, gram) for v, g in zip(units, row))
    mean = math.sqrt(square) if square > 0 else 0.0
    if not mean > eps:  # not: also for NaN
        return list(weights)
    size = sum(w * length for w, length in zip(weights, lengths))
    return [size * u / mean for u in units]


@register_method(
    "multislerp",
    base="optional",
    summary="mean direction of the models, at their mean length",
    source="mergekit; goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    parameters=(
        WEIGHT,
        Parameter("normalize_weights", recipe="normalize_weights", kind=bool, default=True, doc="divide the weights by their sum"),
        Parameter("eps", recipe="eps", kind=float, default=1e-8, doc="length up to which the mean has no direction"),
    ),
)
def _tensor(
    base: Tensor | None, models: list[Tensor], *, weights, normalize_weights, eps, name, dtype, out, check_finite
) -> Tensor:  # fmt: skip
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must be at least 0")
    weights = weights_that_sum(weights, normalize_weights)
    if normalize_weights:
        weights = [w / sum(weights) for w in weights]

    def coefficients(gram: Gram) -> list[float]:
        return _coefficients(gram, weights, eps)

    return merge_by_angles(base, models, coefficients, name=name, dtype=dtype, out=out, check_finite=check_finite)
