"""RAM and RAM+: average what several models changed, keep what one model alone changed (Yuan et al. 2026, arXiv:2601.13572)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import finite
from ..conventions import Convention
from ..spec import MergeSpec
from ..tree import Paired
from .flat import Flat, check_inputs, choose
from .fused import merge_each
from .registry import Parameter, register_method

__all__ = ["ram", "ramplus_tl"]

_MEAN_OF_KEPT = Convention(divisor="count")


def ram(
    base: Any,
    models: Sequence[Any],
    *,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """``out = base +`` the mean of those deltas that are larger than epsilon; what one model alone changed stays whole.

    Args:
        base, models, dtype, out, check_finite: as in :func:`pymerge.ties`.
        epsilon: magnitude up to which a delta counts as no change, at least 0.

    Returns and raises: as :func:`pymerge.ties`; ValueError also for a negative epsilon.
    """
    pairs = Paired(base, models, needs_base="ram")
    return merge_each(pairs, _ram, epsilon=finite(epsilon, "epsilon"), dtype=dtype, out=out, check_finite=check_finite)


def ramplus_tl(
    base: Any,
    models: Sequence[Any],
    *,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """:func:`ram` with each model's unique changes made larger, to make up for what averaging takes from its shared ones.

    They are multiplied by ``1 + r * min(shared / unique, alpha)``, counted in each tensor: `shared` elements that the model changed with
    others, and `unique` ones that it changed alone.

    Args:
        base, models, epsilon, dtype, out, check_finite: as in :func:`ram`.
        r: how much larger.
        alpha: largest ratio that counts, at least 0.

    Returns and raises: as :func:`ram`; ValueError also for a negative alpha.
    """
    pairs = Paired(base, models, needs_base="ramplus_tl")
    epsilon, r, alpha = finite(epsilon, "epsilon"), finite(r, "r"), finite(alpha, "alpha")
    return merge_each(pairs, _ramplus_tl, epsilon=epsilon, r=r, alpha=alpha, dtype=dtype, out=out, check_finite=check_finite)


def _check_epsilon(epsilon: float) -> None:
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}; it is a magnitude, at least 0")


_SOURCE = "Yuan et al. 2026, arXiv:2601.13572"
_EPSILON = Parameter("epsilon", recipe="epsilon", kind=float, default=1e-5, doc="magnitude up to which a delta counts as no change")


@register_method("ram", base="required", summary="mean of the deltas that are changes at all", source=_SOURCE, parameters=(_EPSILON,))
def _ram(base: Tensor, models: list[Tensor], *, epsilon, name, dtype, out, check_finite) -> Tensor:
    _check_epsilon(epsilon)
    # |delta| > epsilon is a selection by magnitude: above the key of epsilon, and nothing at it.
    flat = Flat(base, models)
    key = int(flat.scalar(epsilon).view(torch.int64 if flat.compute == torch.float64 else torch.int32))
    spec = MergeSpec((1.0,) * len(models), (1.0,) * len(models), "magnitude", convention=_MEAN_OF_KEPT)
    selection = torch.tensor([[key, -1]] * len(models))
    return ops.merge(base, models, spec, name=name, selection=selection, dtype=dtype, out=out, check_finite=check_finite)


@register_method(
    "ramplus_tl",
    base="required",
    summary="ram with unique changes made larger",
    source=_SOURCE,
    parameters=(
        _EPSILON,
        Parameter("r", recipe="r", kind=float, default=0.1, doc="how much larger"),
        Parameter("alpha", recipe="alpha", kind=float, default=0.2, doc="largest ratio of shared to unique changes that counts"),
    ),
)
def _ramplus_tl(base: Tensor, models: list[Tensor], *, epsilon, r, alpha, name, dtype, out, check_finite) -> Tensor:
    _check_epsilon(epsilon)
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; it is a ratio, at least 0")
    if check_finite:
        check_inputs(base, models, name)
    flat = Flat(base, models)
    least = flat.scalar(epsilon)

    def changes(at: slice) -> tuple[list[Tensor], list[Tensor], Tensor]:
        deltas = flat.deltas(at)
        changed = [d.abs() > least for d in deltas]
        return deltas, changed, sum(c.to(torch.int32) for c in changed)

    counts = torch.zeros((len(models), 2), dtype=torch.int64, device=flat.device)  # unique changes, all changes
    for at in flat.pieces():
        _, changed, together = changes(at)
        alone = together == 1
        counts += torch.stack([torch.stack([torch.count_nonzero(c & alone), torch.count_nonzero(c)]) for c in changed])
    factors = [flat.scalar(1.0 + r * min((all_of_it - unique) / max(unique, 1), alpha)) for unique, all_of_it in counts.tolist()]

    def merged(at: slice) -> Tensor:
        deltas, changed, together = changes(at)
        alone = together == 1
        total = torch.zeros((), dtype=flat.compute, device=flat.device)
        for delta, c, factor in zip(deltas, changed, factors, strict=True):
            total = total + choose(c, choose(alone, delta * factor, delta))
        return flat.base(at) + total / together.clamp(min=1)

    return flat.write(merged, dtype, out)
