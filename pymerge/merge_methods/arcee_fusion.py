"""Arcee Fusion: take over only the elements whose change is of unusual importance, as in mergekit (Arcee AI)."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..tree import Paired
from .flat import Flat, check_inputs, choose, row_sums
from .fused import merge_each
from .registry import register_method

__all__ = ["arcee_fusion"]


def arcee_fusion(
    base: Any,
    model: Any,
    *,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """The model where its change is important, the base elsewhere.

    The importance of an element is ``|model - base| * KL(p || q)``, p and q the softmax of the model's and of the base's row (the last
    dimension), each plus 1e-8. Taken over are the elements with at least the importance ``median + 1.5 * (q3 - q1)`` of their tensor. The
    quartiles are exact, the sorted importances' elements floor(0.25, 0.5, 0.75 * (n - 1)), however large the tensor.

    Where rows have one element, or base and model differ by a constant in every row, KL is 0, every importance too, and so the whole tensor
    is taken over.

    Args:
        base, model: two tensors, two mappings name -> tensor or two nn.Modules.
        dtype, out, check_finite: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`.
    """
    pairs = Paired(base, [model], labels=("base", "model"), needs_base="arcee_fusion")
    return merge_each(pairs, _tensor, dtype=dtype, out=out, check_finite=check_finite)


_FLOOR = 1e-8  # mergekit's, added to each probability


def _divergence(model: Tensor, base: Tensor) -> Tensor:
    """KL of each row, [rows, columns] fp64 to [rows, 1]. Sums that are equal but for rounding can leave it a trifle below zero."""
    p, q = (_softmax(x) + _FLOOR for x in (model, base))
    return row_sums(p * (p / q).log()).clamp(min=0.0).unsqueeze(1)


def _softmax(x: Tensor) -> Tensor:
    power = (x - x.amax(dim=1, keepdim=True)).exp()
    return power / row_sums(power).unsqueeze(1)


def _threshold(importance: Tensor) -> float:
    """median + 1.5 * (q3 - q1) of non-negative numbers."""
    n = importance.numel()
    ranks = [n - (quarter * (n - 1)) // 4 for quarter in (1, 2, 3)]  # from the largest, which is 1
    keys = ops.select(None, [[importance]] * 3, ranks)[:, 0].tolist()
    wide = importance.dtype == torch.float64
    # A selection that keeps everything has no key of its own.
    smallest = float(importance.min())
    values = [smallest if rank == n else struct.unpack("<d" if wide else "<f", key.to_bytes(8 if wide else 4, "little"))[0]
              for rank, key in zip(ranks, keys)]  # fmt: skip
    first, median, third = values
    return median + 1.5 * (third - first)


@register_method(
    "arcee_fusion",
    base="required",
    max_models=1,
    summary="the model's elements whose change is unusually important",
    source="mergekit; arcee.ai",
    cpu_only="its exponentials and logarithms are torch's own, whose last digits differ between devices",
)
def _tensor(base: Tensor, models: list[Tensor], *, name, dtype, out, check_finite) -> Tensor:
    if check_finite:
        check_inputs(base, models, name)
    flat = Flat(base, models)
    importance = torch.empty(flat.n, dtype=flat.compute, device=flat.device)
    for at in flat.pieces(flat.columns):
        (delta,), (model,) = flat.deltas(at), flat.models(at)
        divergence = _divergence(*(x.view(-1, flat.columns).double() for x in (model, flat.base(at))))
        importance[at] = (delta.view(-1, flat.columns).abs() * divergence.to(flat.compute)).view(-1)
    least = flat.scalar(_threshold(importance) if flat.n else 0.0)

    def fused(at: slice) -> Tensor:
        return choose(importance[at] >= least, flat.models(at)[0], flat.base(at))

    return flat.write(fused, dtype, out)
