"""TIES-Merging: trim, elect a sign, merge what agrees (Yadav et al. 2023, arXiv:2306.01708)."""

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
from .registry import register_method
from .sliced import fused_slices, whole_model

__all__ = ["ties"]


def ties(
    base: Any,
    models: Sequence[Any],
    *,
    weights: float | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    convention: ConventionLike = "default",
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """Merge models by TIES: keep each model's largest deltas, let every element elect a sign, average the deltas that agree.

    ``out = base + scale * mean_i(weights[i] * delta_i)`` over the kept deltas with the elected sign, ``delta_i = models[i] - base``.

    Args:
        base: a tensor, a mapping name -> tensor or an nn.Module.
        models: list of models of the base's kind, with the same names, shapes and devices.
        weights: a number or one per model; 1 each by default.
        density: fraction of each delta that is kept, in [0, 1]; a number or one per model.
        scale: multiplies the merged delta (the paper's lambda).
        convention: a preset's name or a :class:`pymerge.Convention`. ``"default"`` agrees with mergekit and ranks within each tensor;
            ``"paper"`` ranks over the whole model, which has to fit in memory (in recipes it need not). In a whole-model ranking one fp64
            tensor makes every tensor compute in fp64, and ``rescale="norm"`` still restores each tensor's own norm. For bare tensors the
            two scopes are the same.
        dtype: of the result; by default the common dtype of base and models, per tensor.
        out: tensors to write into, of the inputs' names and shapes, sharing no memory with them; returned.
        check_finite: refuse NaN and Inf in an input. Unchecked, a NaN has no sign and so agrees with nobody.

    Returns:
        A new tensor, or a dict of tensors in the base's order (for a module: a state dict), without autograd history. Integer and boolean
        tensors, which must be equal in all models, are copied. Names tied to one tensor in every model are tied in the result.

    Raises:
        ValueError: names, shapes or devices differ; density outside [0, 1]; not one weight per model; no models.
        TypeError: models of different kinds; sparse, quantised or meta tensors.
        NonFiniteError: a NaN or Inf in an input.
    """
    pairs = Paired(base, models, needs_base="ties")
    spec = MergeSpec(
        per_model(weights, pairs.count, "weights"),
        per_model(density, pairs.count, "density"),
        sparsify="magnitude",
        elect=True,
        convention=Convention.resolve(convention, "ties"),
        scale=finite(scale, "scale"),
    )
    return merge_models(pairs, spec, dtype=dtype, out=out, check_finite=check_finite)


def _recipe_spec(*, weights, density, normalize, rescale, int8_mask, scale, convention) -> MergeSpec:
    return MergeSpec(weights, density, "magnitude", True, recipe_convention(convention, "ties", normalize, rescale), scale)


@register_method(
    "ties",
    base="required",
    summary="trim small deltas, elect a sign per element, average what agrees",
    source="Yadav et al. 2023, arXiv:2306.01708",
    parameters=(WEIGHT, DENSITY, NORMALIZE, RESCALE, INT8_MASK, LAMBDA, CONVENTION),
    sliced=fused_slices(_recipe_spec),
    whole_model=whole_model(_recipe_spec),
)
def _tensor(base: Tensor, models: list[Tensor], *, name, dtype, out, check_finite, **parameters) -> Tensor:
    return ops.merge(base, models, _recipe_spec(**parameters), name=name, dtype=dtype, out=out, check_finite=check_finite)
