"""Weighted averages of models: linear merges and uniform soups (Wortsman et al. 2022, arXiv:2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import per_model
from ..conventions import Convention
from ..spec import MergeSpec
from ..tree import Paired
from .fused import merge_models, weights_that_sum
from .recipe_parameters import WEIGHT
from .registry import Parameter, register_method
from .sliced import fused_slices

__all__ = ["linear", "model_soup"]


def linear(
    models: Sequence[Any],
    *,
    weights: float | Sequence[float] | None = None,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """The weighted mean of models, ``sum_i(weights[i] * models[i]) / sum(weights)``, or their weighted sum.

    Args:
        models: list of tensors, mappings name -> tensor or nn.Modules, all of one kind.
        weights: a number or one per model; 1 each by default.
        normalize: divide by the sum of the weights.
        dtype, out, check_finite: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`; ValueError also when weights that sum to zero are to be normalised.
    """
    pairs = Paired(None, models)
    spec = _spec(per_model(weights, pairs.count, "weights"), normalize)
    return merge_models(pairs, spec, dtype=dtype, out=out, check_finite=check_finite)


def model_soup(
    state_dicts: Sequence[Any],
    weights: float | Sequence[float] | None = None,
    *,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """The mean of models that share an initialisation (a uniform soup), or their weighted mean: :func:`linear` with ``normalize=True``."""
    return linear(state_dicts, weights=weights, dtype=dtype, out=out, check_finite=check_finite)


def _spec(weights: Sequence[float], normalize: bool) -> MergeSpec:
    convention = Convention(divisor="weights" if normalize else "none")
    return MergeSpec(weights_that_sum(weights, normalize), (1.0,) * len(weights), convention=convention)


_NORMALIZE = Parameter("normalize", recipe="normalize", kind=bool, default=True, doc="divide by the sum of the weights")
_SOURCE = "Wortsman et al. 2022, arXiv:2203.05482"


@register_method(
    "linear",
    base="model",
    summary="weighted mean of the models",
    source=_SOURCE,
    parameters=(WEIGHT, _NORMALIZE),
    sliced=fused_slices(_spec),
)
@register_method(
    "model_soup",
    base="model",
    summary="mean of the models; weights are optional",
    source=_SOURCE,
    parameters=(replace(WEIGHT, default=1.0), _NORMALIZE),
    sliced=fused_slices(_spec),
)
def _tensor(base: None, models: list[Tensor], *, weights, normalize, name, dtype, out, check_finite) -> Tensor:
    return ops.merge(None, models, _spec(weights, normalize), name=name, dtype=dtype, out=out, check_finite=check_finite)
