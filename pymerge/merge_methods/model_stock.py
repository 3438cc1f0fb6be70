"""Model Stock: how far to go from the base to the models' mean, from the angle between the models (Jang et al. 2024, arXiv:2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tree import Paired
from .directions import Gram, merge_by_angles
from .flat import Flat, check_inputs
from .fused import merge_each
from .registry import Parameter, register_method

__all__ = ["model_stock"]


def model_stock(
    base: Any,
    models: Sequence[Any],
    *,
    filter_wise: bool = False,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """``t * mean(models) + (1 - t) * base`` with ``t = N c / (1 + (N - 1) c)``, c the mean cosine between two of the N deltas.

    Models that agree (c = 1) give their mean, models at right angles the base (eq. 4 of the paper, and its generalisation to N).

    Args:
        base, dtype, out, check_finite: as in :func:`pymerge.ties`.
        models: at least two models.
        filter_wise: a ratio for each row (the last dimension) and not for the whole tensor.

    Returns and raises: as :func:`pymerge.ties`; ValueError also for fewer than two models.
    """
    pairs = Paired(base, models, needs_base="model_stock")
    if pairs.count < 2:
        raise ValueError("one model given; model_stock compares models, so it takes at least two")
    return merge_each(pairs, _tensor, filter_wise=filter_wise, dtype=dtype, out=out, check_finite=check_finite)


def _ratio(gram: Tensor) -> Tensor:
    """t for fp64 dot products [models, models, ...]. A delta of zeros is at right angles to every other."""
    count = gram.shape[0]
    lengths = gram.diagonal().movedim(-1, 0).sqrt()
    total = torch.zeros_like(lengths[0])
    for i in range(count):
        for j in range(i + 1, count):
            size = lengths[i] * lengths[j]
            total = total + torch.where(size > 0, gram[i, j] / size, 0.0).clamp(-1.0, 1.0)
    cosine = total / (count * (count - 1) / 2)
    divisor = 1.0 + (count - 1) * cosine
    # Deltas that sum to nothing make it zero: their mean is the base, whatever t is.
    return torch.where(divisor > 1e-6, count * cosine / divisor, 0.0)


@register_method(
    "model_stock",
    base="required",
    min_models=2,
    summary="towards the models' mean, as far as their deltas' angle says",
    source="Jang et al. 2024, arXiv:2403.19522, eq. 4",
    parameters=(Parameter("filter_wise", recipe="filter_wise", kind=bool, default=False, doc="a ratio per row, not per tensor"),),
)
def _tensor(base: Tensor, models: list[Tensor], *, filter_wise, name, dtype, out, check_finite) -> Tensor:
    count = len(models)
    if filter_wise and base.dim() > 1:
        if check_finite:
            check_inputs(base, models, name)
        flat = Flat(base, models)
        return flat.combine_rows([_ratio(flat.row_gram()) / count] * count, dtype, out)

    def coefficients(gram: Gram) -> list[float]:
        return [float(_ratio(torch.tensor(gram, dtype=torch.float64))) / count] * count

    return merge_by_angles(base, models, coefficients, name=name, dtype=dtype, out=out, check_finite=check_finite)
