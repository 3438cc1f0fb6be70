"""WiSE-FT: the straight line between a zero-shot and a fine-tuned model (Wortsman et al. 2022, arXiv:2109.01903)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import many_ops, ops, slice_ops, staging
from ..arguments import finite
from ..tree import Paired
from .registry import Parameter, register_method
from .sliced import Sliced

__all__ = ["wise_ft"]


def wise_ft(
    base: Any,
    finetuned: Any,
    *,
    alpha: float = 0.5,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
    device: torch.device | str | None = None,
) -> Any:
    """``(1 - alpha) * base + alpha * finetuned``: exactly the base at 0, exactly the fine-tuned model at 1, unchanged where both agree.

    Args:
        base, finetuned: two tensors, two mappings name -> tensor or two nn.Modules.
        alpha: the fine-tuned model's share; values outside [0, 1] extrapolate.
        dtype, out, check_finite, device: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`.
    """
    alpha = finite(alpha, "alpha")
    labels = ("base", "finetuned")
    pairs = Paired(base, [finetuned], labels=labels, needs_base="wise_ft")
    if device is not None:
        return staging.lerp_staged(pairs, alpha, device, dtype=dtype, out=out, labels=labels, check_finite=check_finite)
    return pairs.result_of_many(
        lambda jobs: many_ops.lerp_many(jobs, alpha, labels=labels, check_finite=check_finite),
        many_ops.group_bytes,
        merge_plain=lambda plain: plain.lerp(alpha, labels=labels, check_finite=check_finite),
        dtype=dtype,
        out=out,
    )


class _Slices(Sliced):
    def merge(self, name, first, base, models, out, check_finite) -> None:
        tensor = self.tensors[name]
        alpha = finite(tensor.parameters["alpha"], "alpha")
        slice_ops.lerp(base, models[0], alpha, out, name=name, first=first, shape=tensor.shape, check_finite=check_finite)


@register_method(
    "wise_ft",
    base="required",
    max_models=1,
    summary="interpolate between the base and one fine-tuned model",
    source="Wortsman et al. 2022, arXiv:2109.01903, eq. 1",
    parameters=(Parameter("alpha", recipe="alpha", kind=float, default=0.5, doc="the fine-tuned model's share"),),
    sliced=_Slices,
)
def _tensor(base: Tensor, models: list[Tensor], *, alpha, name, dtype, out, check_finite) -> Tensor:
    labels = ("base", "model 0")
    return ops.lerp(base, models[0], finite(alpha, "alpha"), dtype=dtype, out=out, name=name, labels=labels, check_finite=check_finite)
