"""What TIES, DARE, task arithmetic and the soups share: one :class:`MergeSpec` applied to every tensor of the models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import many_ops, staging
from ..conventions import Convention
from ..spec import MergeSpec
from ..tree import Paired

__all__ = ["merge_each", "merge_models", "recipe_convention", "weights_that_sum"]


def merge_each(pairs: Paired, tensor: Callable[..., Tensor], *, dtype: torch.dtype | None, out: Any, **arguments) -> Any:
    """`tensor`, a registered method, with the same arguments for every tensor of the models."""

    def merge_one(name: str, base: Tensor | None, models: list[Tensor], dtype: torch.dtype, to: Tensor | None) -> Tensor:
        return tensor(base, models, name=name, dtype=dtype, out=to, **arguments)

    return pairs.result(merge_one, dtype=dtype, out=out)


def merge_models(
    pairs: Paired, spec: MergeSpec, *, dtype: torch.dtype | None, out: Any, check_finite: bool, device: torch.device | str | None
) -> Any:
    """`spec` applied to every tensor; ranks and tied elections of scope "model" are taken over all tensors together.

    With a `device`, tensors in CPU memory are merged there.
    """
    if device is not None:
        return staging.merge_staged(pairs, spec, device, dtype=dtype, out=out, check_finite=check_finite)
    ranked_together = spec.convention.scope == "model" and pairs.kind != "tensor"
    plain = pairs.plain is not None and (not ranked_together or pairs.plain.of_one_arithmetic)
    if ranked_together and not plain:
        devices = {pairs.facts[0][n].device for n in pairs.merged}
        if len(devices) > 1:
            listed = ", ".join(sorted(map(str, devices)))
            raise ValueError(f'scope "model" ranks all tensors together, and they are on several devices: {listed}; move them to one')
    return pairs.result_of_many(
        lambda jobs: many_ops.merge_many(jobs, spec, check_finite=check_finite),
        lambda device: math.inf if ranked_together else many_ops.group_bytes(device),
        merge_plain=(lambda plain: plain.merge(spec, check_finite=check_finite, together=ranked_together)) if plain else None,
        dtype=dtype,
        out=out,
    )


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
