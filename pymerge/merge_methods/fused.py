"""What TIES, DARE, task arithmetic and the soups share: one :class:`MergeSpec` applied to every tensor of the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..conventions import Convention, kept_count
from ..spec import MergeSpec
from ..tree import Paired

__all__ = ["merge_each", "merge_models", "recipe_convention", "weights_that_sum"]


def merge_each(pairs: Paired, tensor: Callable[..., Tensor], *, dtype: torch.dtype | None, out: Any, **arguments) -> Any:
    """`tensor`, a registered method, with the same arguments for every tensor of the models."""

    def merge_one(name: str, base: Tensor | None, models: list[Tensor], dtype: torch.dtype, to: Tensor | None) -> Tensor:
        return tensor(base, models, name=name, dtype=dtype, out=to, **arguments)

    return pairs.result(merge_one, dtype=dtype, out=out)


def merge_models(pairs: Paired, spec: MergeSpec, *, dtype: torch.dtype | None, out: Any, check_finite: bool) -> Any:
    """`spec` applied tensor by tensor; ranks and tied elections of scope "model" are taken over all tensors together first."""
    scope = _ModelScope(pairs, spec) if spec.convention.scope == "model" and pairs.kind != "tensor" and pairs.merged else None

    def merge_one(name: str, b: Tensor | None, xs: list[Tensor], dtype: torch.dtype, to: Tensor | None) -> Tensor:
        if scope is None:
            return ops.merge(b, xs, spec, name=name, dtype=dtype, out=to, check_finite=check_finite)
        b, xs = scope.widened(b, xs)
        return ops.merge(
            b, xs, spec, name=name, selection=scope.selections.get(name), balance=scope.balance, dtype=dtype, out=to,
            check_finite=check_finite,
        )  # fmt: skip

    return pairs.result(merge_one, dtype=dtype, out=out)


class _ModelScope:
    """What scope "model" knows of all tensors together: each model's threshold, and who wins a tied election.

    The tensors count in the order of their names, as in the TIES authors' code, which flattens sorted state dicts. Magnitudes of fp32
    and fp64 compare only when both are fp64, so if one tensor computes in fp64, all do.
    """

    def __init__(self, pairs: Paired, spec: MergeSpec) -> None:
        names = sorted(pairs.merged)
        devices = {pairs.facts[0][n].device for n in names}
        if len(devices) > 1:
            listed = ", ".join(sorted(map(str, devices)))
            raise ValueError(f'scope "model" ranks all tensors together, and they are on several devices: {listed}; move them to one')
        self._widen = bool(pairs.doubles) and any(n not in pairs.doubles for n in names)
        self.selections: dict[str, Tensor] = {}
        self.balance: int | None = None
        if spec.trims:
            self._select(pairs, names, spec)
        if spec.elect and spec.convention.zero_vote == "majority":
            self.balance = 0
            for name in names:
                base, models = self.widened(*pairs.tensors(name))
                self.balance += ops.vote_balance(base, models, spec, name=name, selection=self.selections.get(name))

    def widened(self, base: Tensor | None, models: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """The tensors such that they compute in the scope's dtype; one fp64 tensor is enough for that."""
        if not self._widen:
            return base, models
        return (base, [models[0].double(), *models[1:]]) if base is None else (base.double(), models)

    def _select(self, pairs: Paired, names: Sequence[str], spec: MergeSpec) -> None:
        rows = [pairs.tensors(name) for name in names]
        bases = None if rows[0][0] is None else [base for base, _ in rows]
        sizes = [models[0].numel() for _, models in rows]
        counts = [kept_count(density, sum(sizes), spec.convention.k) for density in spec.densities]
        columns = [[models[i] for _, models in rows] for i in range(len(counts))]
        thresholds = ops.select(bases, columns, counts, spec.convention.tie_break)
        start = 0
        for name, size in zip(names, sizes):
            # The cut counts from the model's first element; in a tensor it counts from the tensor's: -1 keeps no equal, size - 1 all.
            local = thresholds.clone()
            local[:, 1] = (local[:, 1] - start).clamp(-1, size - 1)
            self.selections[name] = local
            start += size


def weights_that_sum(weights: Sequence[float], normalize: bool) -> tuple[float, ...]:
    """`weights`, refused when they are to be divided by their sum and cancel to nothing (in fp32: to rounding errors).

    Raises:
        ValueError: the weights sum to zero.
    """
    if normalize and abs(sum(weights)) <= 1e-6 * sum(map(abs, weights)):
        raise ValueError(f"weights {list(weights)} sum to zero, so they cannot be normalised; pass normalize=False or other weights")
    return tuple(weights)


def recipe_convention(preset: str, method: str, normalize: bool | None, rescale: bool | None) -> Convention:
    """The convention that a recipe asks for: a preset, with mergekit's switches on top where they are given."""
    convention = Convention.resolve(preset, method)
    if normalize is not None:
        # An average by count (PEFT's) is one kind of normalising: asking for it does not change which.
        kind = "weights" if convention.divisor == "none" else convention.divisor
        convention = convention.replace(divisor=kind if normalize else "none")
    if rescale is not None:
        kind = "norm" if convention.rescale == "none" else convention.rescale
        convention = convention.replace(rescale=kind if rescale else "none")
    return convention
