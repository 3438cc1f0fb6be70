"""NuSLERP: spherical interpolation of two models or of their deltas, by weights, of whole tensors or of rows, as in mergekit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import per_model
from ..tree import Paired
from .directions import Gram, merge_by_angles
from .flat import Flat, check_inputs
from .fused import merge_each, weights_that_sum
from .recipe_parameters import WEIGHT
from .registry import Parameter, register_method

__all__ = ["nuslerp"]

_NO_SINE = 1e-6  # closer to one line than 1e-6 radians: of two fp32 vectors no arc is left


def nuslerp(
    models: Sequence[Any],
    *,
    base: Any = None,
    weights: float | Sequence[float] | None = None,
    flatten: bool = True,
    row_wise: bool = False,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """A point on the arc between two models or deltas: ``out = base + (sin((1-t)θ) d_0 + sin(tθ) d_1) / sin θ``.

    ``t = w_1 / (w_0 + w_1)`` and ``d_i = models[i] - base``; without a base the models themselves. θ is the angle of d_0 and d_1. Vectors
    within 1e-6 radians of one line are interpolated linearly; one of zeros stands at a right angle to everything.

    Args:
        models: two tensors, two mappings name -> tensor or two nn.Modules.
        base: of the same kind, or None.
        weights: one per model; equal by default.
        flatten: a tensor is one vector. If not, each of its rows is one (along the last dimension), or with `row_wise` each of its columns
            (along the first), as mergekit names it.
        dtype, out, check_finite: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`; ValueError also unless there are two models, and when the weights sum to zero.
    """
    pairs = Paired(base, models)
    if pairs.count != 2:
        raise ValueError(f"{pairs.count} models given; nuslerp takes exactly two (multislerp and karcher take more)")
    weights = per_model(weights, 2, "weights")
    return merge_each(pairs, _tensor, weights=weights, flatten=flatten, row_wise=row_wise, dtype=dtype, out=out, check_finite=check_finite)


def _arc(aa: Tensor, bb: Tensor, ab: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """What the two vectors are multiplied with, from their dot products: fp64 [rows]."""
    lengths = aa.sqrt() * bb.sqrt()
    cosine = torch.where(lengths > 0, ab / lengths, 0.0).clamp(-1.0, 1.0)
    angle = cosine.acos()
    sine = angle.sin()  # of the angle itself: the quotients then hardly depend on its last digits
    arc = sine > _NO_SINE  # not where it is NaN
    return torch.where(arc, ((1.0 - t) * angle).sin() / sine, 1.0 - t), torch.where(arc, (t * angle).sin() / sine, t)


@register_method(
    "nuslerp",
    base="optional",
    min_models=2,
    max_models=2,
    summary="spherical interpolation of two models or their deltas, by weights",
    source="mergekit; Shoemake 1985, doi:10.1145/325165.325242",
    parameters=(
        WEIGHT,
        Parameter("flatten", recipe="nuslerp_flatten", kind=bool, default=True, doc="a tensor is one vector"),
        Parameter("row_wise", recipe="nuslerp_row_wise", kind=bool, default=False, doc="not flattened: vectors along the first dimension"),
    ),
)
def _tensor(
    base: Tensor | None, models: list[Tensor], *, weights, flatten, row_wise, name, dtype, out, check_finite
) -> Tensor:  # fmt: skip
    weights = weights_that_sum(weights, True)
    t = weights[1] / sum(weights)
    if flatten or models[0].dim() < 2:

        def coefficients(gram: Gram) -> list[float]:
            both = _arc(*(torch.tensor(g, dtype=torch.float64) for g in (gram[0][0], gram[1][1], gram[0][1])), t)
            return [float(c) for c in both]

        return merge_by_angles(base, models, coefficients, name=name, dtype=dtype, out=out, check_finite=check_finite)
    if check_finite:
        check_inputs(base, models, name)
    if not row_wise:
        return _rows(base, models, t, dtype, out)
    turned = _rows(None if base is None else base.transpose(0, -1), [x.transpose(0, -1) for x in models], t, dtype, None).transpose(0, -1)
    return turned.contiguous() if out is None else out.copy_(turned)


def _rows(base: Tensor | None, models: list[Tensor], t: float, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    flat = Flat(base, models)
    gram = flat.row_gram()
    return flat.combine_rows(_arc(gram[0, 0], gram[1, 1], gram[0, 1], t), dtype, out)
