"""DELLA: drop deltas at random, the smaller the likelier, then add or TIES-merge them (Deep et al. 2024, arXiv:2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import finite, integer, per_model
from ..conventions import Convention, ConventionLike
from ..reference import draws
from ..spec import MergeSpec, tensor_id
from ..tree import Paired
from .flat import Flat, check_inputs, choose, row_sums
from .fused import merge_each, recipe_convention
from .recipe_parameters import CONVENTION, DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, SEED, WEIGHT
from .registry import Parameter, register_method

__all__ = ["della", "della_linear"]


def della(
    base: Any,
    models: Sequence[Any],
    *,
    weights: float | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.15,
    scale: float = 1.0,
    seed: int = 0,
    convention: ConventionLike = "default",
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """Drop by rank, rescale, elect a sign per element as in TIES, average the deltas that agree with it.

    An element is kept with the probability ``p = density - epsilon + 2 * epsilon * r / (columns - 1)``, r its rank by magnitude in its row
    of the tensor (the last dimension), from 0 for the smallest; of equal magnitudes the lower index ranks higher. What is kept is divided
    by p, which leaves each delta's mean as it was (the paper's section 2, where p is the probability to drop).

    Args:
        base, models, weights, scale, dtype, out, check_finite: as in :func:`pymerge.ties`.
        density: mean probability that an element is **kept**, in [0, 1]; a number or one per model. 1 keeps everything and 0 nothing.
        epsilon: how far p goes below and above the density; a number or one per model.
        seed: an integer in [0, 2**64). The draws are those of :func:`pymerge.dare_linear`.
        convention: a preset's name or a :class:`pymerge.Convention`; ``"mergekit"`` restores each delta's L1 norm instead of dividing by p.

    Returns and raises: as :func:`pymerge.ties`; ValueError also where density - epsilon is not above 0 or density + epsilon is above 1, and
    for scope "model".
    """
    return _della("della", base, models, weights, density, epsilon, scale, seed, convention, dtype, out, check_finite)


def della_linear(
    base: Any,
    models: Sequence[Any],
    *,
    weights: float | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.15,
    scale: float = 1.0,
    seed: int = 0,
    convention: ConventionLike = "default",
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """:func:`della` without an election: ``out = base + scale * sum_i(weights[i] * keep_i * delta_i / p_i)``.

    Arguments, result and errors are those of :func:`della`.
    """
    return _della("della_linear", base, models, weights, density, epsilon, scale, seed, convention, dtype, out, check_finite)


def _della(method, base, models, weights, density, epsilon, scale, seed, convention, dtype, out, check_finite) -> Any:
    pairs = Paired(base, models, needs_base=method)
    spec = MergeSpec(
        per_model(weights, pairs.count, "weights"),
        per_model(density, pairs.count, "density"),
        elect=method == "della",
        convention=Convention.resolve(convention, method),
        scale=finite(scale, "scale"),
        seed=integer(seed, "seed"),
    )
    epsilon = per_model(epsilon, pairs.count, "epsilon")
    _check(method, spec, epsilon)
    return merge_each(pairs, _merge, spec=spec, epsilon=epsilon, dtype=dtype, out=out, check_finite=check_finite)


def _check(method: str, spec: MergeSpec, epsilon: Sequence[float]) -> None:
    if spec.convention.scope == "model":
        raise ValueError(f'{method} ranks within the rows of each tensor; pass a Convention of scope "tensor"')
    if spec.elect and spec.convention.zero_vote == "majority":
        raise ValueError(f'{method} works on a piece of a tensor at a time, which has no majority; choose zero_vote "positive" or "drop"')
    for i, (density, eps) in enumerate(zip(spec.densities, epsilon, strict=True)):
        if 0 < density < 1 and not (eps >= 0 and density - eps > 0 and density + eps <= 1):
            raise ValueError(
                f"density {density} and epsilon {eps} of model {i} give probabilities from {density - eps:g} to {density + eps:g}; "
                "choose an epsilon of at least 0 with density - epsilon > 0 and density + epsilon <= 1"
            )


def _merge(base: Tensor, models: list[Tensor], *, spec, epsilon, name, dtype, out, check_finite) -> Tensor:
    if check_finite:
        check_inputs(base, models, name)
    flat = Flat(base, models)
    ident = tensor_id(name)

    def chosen(i: int, at: slice, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Whether elements are kept, and the probability of it."""
        chances = _chances(delta.view(-1, flat.columns), spec.densities[i], epsilon[i]).view(-1)
        return draws(at.start, at.stop, ident, i, spec.seed, flat.device) < (chances * 2.0**32).round(), chances

    norm = spec.convention.rescale == "norm"
    masks, factors = _masks_and_factors(flat, len(models), chosen) if norm else ([], [])
    # What is left to do is a merge without base of deltas that are zero where dropped.
    rest = replace(spec, sparsify="magnitude", densities=(1.0,) * len(models), convention=spec.convention.replace(rescale="none"))
    not_zero = torch.tensor([[0, -1]] * len(models))

    def merged(at: slice) -> Tensor:
        kept = []
        for i, delta in enumerate(flat.deltas(at)):
            if norm:
                keep, delta = masks[i][at], delta * flat.scalar(factors[i])
            else:
                keep, chances = chosen(i, at, delta)
                if spec.convention.rescale == "density":
                    delta = (delta.double() / chances).to(flat.compute)
            kept.append(choose(keep, delta))
        return flat.base(at) + ops.merge(None, kept, rest, selection=not_zero, dtype=flat.compute, check_finite=False)

    return flat.write(merged, dtype, out, flat.columns)


def _chances(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """The probability of each element of [rows, columns] to be kept, in fp64."""
    if not 0 < density < 1:
        return torch.full(rows.shape, density, dtype=torch.float64, device=rows.device)
    columns = rows.shape[1]
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    falling = torch.arange(columns - 1, -1, -1, device=rows.device)
    rank = torch.empty_like(order).scatter_(1, order, falling.expand_as(order))
    rank = rank.double()
    # A number from the host would make a GPU multiply by its rounded reciprocal.
    share = rank / torch.full_like(rank[:, :1], columns - 1) if columns > 1 else rank + 0.5  # one element is neither small nor large
    return (density - epsilon) + share * (2 * epsilon)


def _masks_and_factors(flat: Flat, count: int, chosen) -> tuple[list[Tensor], list[float]]:
    """What is kept of each delta, and the factor that gives that the whole delta's L1 norm; the masks are kept, a byte per element."""
    masks = [torch.empty(flat.n, dtype=torch.bool, device=flat.device) for _ in range(count)]
    sums = torch.zeros((count, 2), dtype=torch.float64, device=flat.device)
    for at in flat.pieces(flat.columns):
        for i, delta in enumerate(flat.deltas(at)):
            masks[i][at] = chosen(i, at, delta)[0]
            size = delta.double().abs()
            sums[i] += row_sums(torch.stack([size, choose(masks[i][at], size)]))
    return masks, [full / part if part > 0 else 1.0 for full, part in sums.tolist()]


_EPSILON = Parameter("epsilon", recipe="epsilon", kind=float, default=0.15, per_model=True, doc="how far the chance goes from the density")


def _register(method: str, summary: str) -> None:
    @register_method(
        method,
        base="required",
        summary=summary,
        source="Deep et al. 2024, arXiv:2406.11617",
        parameters=(WEIGHT, DENSITY, _EPSILON, NORMALIZE, RESCALE, INT8_MASK, LAMBDA, SEED, CONVENTION),
    )
    def tensor(
        base: Tensor, models: list[Tensor], *, weights, density, epsilon, normalize, rescale, int8_mask, scale, seed, convention, name,
        dtype, out, check_finite,
    ) -> Tensor:  # fmt: skip
        details = recipe_convention(convention, method, normalize, rescale)
        spec = MergeSpec(weights, density, elect=method == "della", convention=details, scale=scale, seed=seed)
        _check(method, spec, epsilon)
        return _merge(base, models, spec=spec, epsilon=epsilon, name=name, dtype=dtype, out=out, check_finite=check_finite)


_register("della", "drop deltas at random, small ones rather, elect a sign, average what agrees")
_register("della_linear", "drop deltas at random, small ones rather, rescale the rest, add them")
