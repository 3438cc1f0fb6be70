"""DARE: drop deltas at random and rescale the rest, then add or TIES-merge them (Yu et al. 2024, arXiv:2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import finite, integer, per_model
from ..conventions import Convention, ConventionLike
from ..spec import MergeSpec
from ..tree import Paired
from .fused import merge_models, recipe_convention
from .recipe_parameters import CONVENTION, DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, SEED, WEIGHT
from .registry import register_method
from .sliced import fused_slices

__all__ = ["dare_linear", "dare_ties"]


def dare_linear(
    base: Any,
    models: Sequence[Any],
    *,
    weights: float | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.5,
    scale: float = 1.0,
    seed: int = 0,
    convention: ConventionLike = "default",
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """Add deltas of which a random part was dropped: ``out = base + scale * sum_i(weights[i] * keep_i * delta_i / density[i])``.

    ``keep_i`` is 1 with probability ``density[i]``, so the result is unbiased (Yu et al. 2024, eq. 2). An element's draw depends on `seed`,
    the tensor's name, the element's flat index and the model's place in the list alone: devices, threads and shards do not change it.

    Args:
        base, models, weights, scale, dtype, out, check_finite: as in :func:`pymerge.ties`.
        density: probability that an element is **kept** (the paper's 1 - p), in [0, 1]; a number or one per model.
        seed: an integer in [0, 2**64).
        convention: a preset's name or a :class:`pymerge.Convention`; ``"mergekit"`` rescales by the L1 norm, not by 1/density.

    Returns and raises: as :func:`pymerge.ties`.
    """
    return _dare("dare_linear", False, base, models, weights, density, scale, seed, convention, dtype, out, check_finite)


def dare_ties(
    base: Any,
    models: Sequence[Any],
    *,
    weights: float | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.5,
    scale: float = 1.0,
    seed: int = 0,
    convention: ConventionLike = "default",
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """DARE, then an elected sign per element as in TIES: deltas that disagree with it are left out of the sum.

    Arguments, result and errors are those of :func:`dare_linear`. By default the agreeing deltas are summed, as in mergekit; a
    :class:`pymerge.Convention` with ``divisor="weights"`` or ``"count"`` averages them (``"peft"`` does the latter).
    """
    return _dare("dare_ties", True, base, models, weights, density, scale, seed, convention, dtype, out, check_finite)


def _dare(method, elect, base, models, weights, density, scale, seed, convention, dtype, out, check_finite) -> Any:
    pairs = Paired(base, models, needs_base=method)
    spec = MergeSpec(
        per_model(weights, pairs.count, "weights"),
        per_model(density, pairs.count, "density"),
        sparsify="bernoulli",
        elect=elect,
        convention=Convention.resolve(convention, method),
        scale=finite(scale, "scale"),
        seed=integer(seed, "seed"),
    )
    return merge_models(pairs, spec, dtype=dtype, out=out, check_finite=check_finite)


def _register(method: str, elect: bool, summary: str) -> None:
    def recipe_spec(*, weights, density, normalize, rescale, int8_mask, scale, seed, convention) -> MergeSpec:
        return MergeSpec(weights, density, "bernoulli", elect, recipe_convention(convention, method, normalize, rescale), scale, seed)

    @register_method(
        method,
        base="required",
        summary=summary,
        source="Yu et al. 2024, arXiv:2311.03099",
        parameters=(WEIGHT, DENSITY, NORMALIZE, RESCALE, INT8_MASK, LAMBDA, SEED, CONVENTION),
        sliced=fused_slices(recipe_spec),
    )
    def tensor(base: Tensor, models: list[Tensor], *, name, dtype, out, check_finite, **parameters) -> Tensor:
        return ops.merge(base, models, recipe_spec(**parameters), name=name, dtype=dtype, out=out, check_finite=check_finite)


_register("dare_linear", False, "drop deltas at random, rescale the rest, add them")
_register("dare_ties", True, "drop deltas at random, rescale the rest, elect a sign, add what agrees")
