"""SCE: select where models differ most, calculate their weights, erase the minority's signs (Wan et al. 2024, arXiv:2408.07990)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import finite
from ..conventions import Convention
from ..reference import kept_by_magnitude
from ..spec import MergeSpec
from ..tree import Paired
from .flat import Flat, check_inputs, choose
from .fused import merge_each
from .recipe_parameters import INT8_MASK
from .registry import Parameter, register_method

__all__ = ["sce"]

_MEAN_OF_MAJORITY = Convention(vote_weighted=False, divisor="weights")


def sce(
    base: Any,
    models: Sequence[Any],
    *,
    select_topk: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """Select, calculate, erase: a weighted mean of deltas where models differ most, weights being each model's mean squared delta.

    1. Select: of the elements whose variance over the models is not zero keep the fraction `select_topk` with the largest variance; of
       equal ones the lower index. 2. Calculate: w_i = sum(d_i^2) over the selected elements, divided by the models' total. 3. Erase: per
       element only deltas of the sign of sum_i(d_i) count. ``out = base + sum(w_i d_i) / sum(w_i)`` over what is left.

    Args:
        base, models, dtype, out, check_finite: as in :func:`pymerge.ties`.
        select_topk: fraction of the varying elements that is selected, in [0, 1]; 1 selects every element. Of one model nothing varies.

    Returns and raises: as :func:`pymerge.ties`; ValueError also for a select_topk outside [0, 1].
    """
    pairs = Paired(base, models, needs_base="sce")
    return merge_each(
        pairs, _tensor, select_topk=finite(select_topk, "select_topk"), int8_mask=False, dtype=dtype, out=out, check_finite=check_finite
    )


@register_method(
    "sce",
    base="required",
    summary="mean of deltas where models differ most, weighted by their energy, minority signs erased",
    source="Wan et al. 2024, arXiv:2408.07990",
    parameters=(
        Parameter("select_topk", recipe="select_topk", kind=float, default=1.0, doc="fraction of the varying elements that is selected"),
        INT8_MASK,
    ),
)
def _tensor(base: Tensor, models: list[Tensor], *, select_topk, int8_mask, name, dtype, out, check_finite) -> Tensor:
    if not 0 <= select_topk <= 1:
        raise ValueError(f"select_topk is {select_topk}; it is the fraction that is selected, between 0 and 1")
    flat, count = Flat(base, models), len(models)
    if select_topk == 1:
        spec = _spec(flat, flat.deltas, count)
        return ops.merge(base, models, spec, name=name, dtype=dtype, out=out, check_finite=check_finite)
    if check_finite:
        check_inputs(base, models, name)
    variance = torch.empty(flat.n, dtype=flat.compute, device=flat.device)
    for at in flat.pieces():
        variance[at] = _variance(flat.deltas(at))
    ((key, cut),) = ops.select(None, [[variance]], [int(int(torch.count_nonzero(variance)) * select_topk)]).tolist()

    keep = torch.empty(flat.n, dtype=torch.bool, device=flat.device)
    for at in flat.pieces():
        keep[at] = kept_by_magnitude(variance[at], key, cut - at.start)
    del variance

    def selected(at: slice) -> list[Tensor]:
        return [choose(keep[at], d) for d in flat.deltas(at)]

    spec = _spec(flat, selected, count)

    def merged(at: slice) -> Tensor:
        return flat.base(at) + ops.merge(None, selected(at), spec, dtype=flat.compute, check_finite=False)

    return flat.write(merged, dtype, out)


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    count = torch.full_like(deltas[0][:1], len(deltas))  # a number from the host would make a GPU multiply by its rounded reciprocal
    mean = sum(deltas) / count
    return sum((d - mean) * (d - mean) for d in deltas) / count


def _spec(flat: Flat, selected: Callable[[slice], list[Tensor]], count: int) -> MergeSpec:
    energies = [0.0] * count
    for at in flat.pieces():
        for i, delta in enumerate(selected(at)):
            energies[i] += float(ops.dots(delta, delta)[0])
    total = sum(energies)
    # Where nothing changed, or squares overflow, there is nothing to weigh by.
    weights = tuple(e / total for e in energies) if 0 < total < math.inf else (1.0 / count,) * count
    return MergeSpec(weights, (1.0,) * count, elect=True, convention=_MEAN_OF_MAJORITY)
