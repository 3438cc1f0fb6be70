"""Model Breadcrumbs: add deltas without their largest and their smallest elements (Davari and Belilovsky 2023, arXiv:2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import finite, per_model
from ..conventions import Convention, ConventionLike
from ..spec import MergeSpec
from ..tree import Paired
from .fused import merge_models, recipe_convention
from .recipe_parameters import CONVENTION, DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, WEIGHT
from .registry import Parameter, register_method
from .sliced import fused_slices

__all__ = ["breadcrumbs", "breadcrumbs_ties"]


def breadcrumbs(
    base: Any,
    models: Sequence[Any],
    *,
    weights: float | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.9,
    gamma: float | Sequence[float] = 0.01,
    scale: float = 1.0,
    convention: ConventionLike = "default",
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """Add deltas of which a middle band of magnitudes is kept: ``out = base + scale * sum_i(weights[i] * keep_i * delta_i)``.

    Of a tensor's n elements the int(gamma * n) largest deltas are left out as outliers, the int(density * n) next ones are kept and the
    smallest are left out as noise. Where fewer than int(density * n) elements are left below the outliers, the band reaches up into them.

    Args:
        base, models, weights, scale, dtype, out, check_finite: as in :func:`pymerge.ties`.
        density: fraction of each delta that is **kept**, in [0, 1]; a number or one per model. 1 keeps all, whatever gamma is.
        gamma: fraction of each delta's largest elements that is left out, in [0, 1]; a number or one per model.
        convention: a preset's name or a :class:`pymerge.Convention` of scope "tensor".

    Returns and raises: as :func:`pymerge.ties`; ValueError also for a gamma outside [0, 1] and for scope "model".
    """
    return _breadcrumbs("breadcrumbs", False, base, models, weights, density, gamma, scale, convention, dtype, out, check_finite)


def breadcrumbs_ties(
    base: Any,
    models: Sequence[Any],
    *,
    weights: float | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.9,
    gamma: float | Sequence[float] = 0.01,
    scale: float = 1.0,
    convention: ConventionLike = "default",
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """Breadcrumbs, then an elected sign per element as in TIES: deltas that disagree with it are left out of the sum.

    Arguments, result and errors are those of :func:`breadcrumbs`. The agreeing deltas are summed, as in mergekit; a
    :class:`pymerge.Convention` with ``divisor="weights"`` or ``"count"`` averages them.
    """
    return _breadcrumbs("breadcrumbs_ties", True, base, models, weights, density, gamma, scale, convention, dtype, out, check_finite)


def _breadcrumbs(method, elect, base, models, weights, density, gamma, scale, convention, dtype, out, check_finite) -> Any:
    pairs = Paired(base, models, needs_base=method)
    details = Convention.resolve(convention, method)
    if details.scope == "model":
        raise ValueError(f'{method} ranks within each tensor; pass a Convention of scope "tensor"')
    spec = MergeSpec(
        per_model(weights, pairs.count, "weights"),
        per_model(density, pairs.count, "density"),
        sparsify="band",
        elect=elect,
        convention=details,
        scale=finite(scale, "scale"),
        gammas=per_model(gamma, pairs.count, "gamma"),
    )
    return merge_models(pairs, spec, dtype=dtype, out=out, check_finite=check_finite)


_GAMMA = Parameter("gamma", recipe="gamma", kind=float, default=0.01, per_model=True, doc="fraction of the largest deltas that is left out")


def _register(method: str, elect: bool, summary: str) -> None:
    def recipe_spec(*, weights, density, gamma, normalize, rescale, int8_mask, scale, convention) -> MergeSpec:
        return MergeSpec(weights, density, "band", elect, recipe_convention(convention, method, normalize, rescale), scale, gammas=gamma)

    @register_method(
        method,
        base="required",
        summary=summary,
        source="Davari and Belilovsky 2023, arXiv:2312.06795",
        parameters=(WEIGHT, DENSITY, _GAMMA, NORMALIZE, RESCALE, INT8_MASK, LAMBDA, CONVENTION),
        sliced=fused_slices(recipe_spec),
    )
    def tensor(base: Tensor, models: list[Tensor], *, name, dtype, out, check_finite, **parameters) -> Tensor:
        return ops.merge(base, models, recipe_spec(**parameters), name=name, dtype=dtype, out=out, check_finite=check_finite)


_register("breadcrumbs", False, "drop the largest and the smallest deltas, add the rest")
_register("breadcrumbs_ties", True, "drop the largest and the smallest deltas, elect a sign, add what agrees")
