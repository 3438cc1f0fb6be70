"""Task arithmetic: add scaled task vectors to the base (Ilharco et al. 2023, arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import per_model
from ..conventions import Convention
from ..spec import MergeSpec
from ..tree import Paired
from .fused import merge_models, weights_that_sum
from .recipe_parameters import INT8_MASK, LAMBDA, WEIGHT
from .registry import Parameter, register_method
from .sliced import fused_slices

__all__ = ["task_arithmetic"]

_SUM = Convention(divisor="none")
_MEAN = Convention(divisor="weights")


def task_arithmetic(
    base: Any,
    finetuned: Sequence[Any],
    scales: float | Sequence[float] | None = None,
    *,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """Add task vectors: ``out = base + sum_i(scales[i] * (finetuned[i] - base))``; a negative scale forgets a task.

    Args:
        base: a tensor, a mapping name -> tensor or an nn.Module.
        finetuned: list of models of the base's kind.
        scales: a number or one per model; 1 each by default.
        dtype, out, check_finite: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`.
    """
    pairs = Paired(base, finetuned, needs_base="task_arithmetic")
    spec = MergeSpec(per_model(scales, pairs.count, "scales"), (1.0,) * pairs.count, convention=_SUM)
    return merge_models(pairs, spec, dtype=dtype, out=out, check_finite=check_finite)


def _recipe_spec(*, weights, normalize, int8_mask, scale) -> MergeSpec:
    weights = weights_that_sum(weights, normalize)
    return MergeSpec(weights, (1.0,) * len(weights), convention=_MEAN if normalize else _SUM, scale=scale)


@register_method(
    "task_arithmetic",
    base="required",
    summary="add weighted deltas to the base; negative weights forget",
    source="Ilharco et al. 2023, arXiv:2212.04089, section 2",
    parameters=(
        WEIGHT,
        Parameter("normalize", recipe="normalize", kind=bool, default=False, doc="divide by the sum of the weights"),
        INT8_MASK,
        LAMBDA,
    ),
    sliced=fused_slices(_recipe_spec),
)
def _tensor(base: Tensor, models: list[Tensor], *, name, dtype, out, check_finite, **parameters) -> Tensor:
    return ops.merge(base, models, _recipe_spec(**parameters), name=name, dtype=dtype, out=out, check_finite=check_finite)
