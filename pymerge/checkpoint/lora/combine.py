"""One module's change, merged from several adapters' changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...merge_methods.registry import Method
from .adapter import widened
from .factoring import factor_matrix, factor_product
from .product import product

__all__ = ["Part", "Result", "concatenated", "merged_factors", "merged_products", "nearest"]


@dataclass(frozen=True)
class Part:
    """One adapter's change of the module: ``scale * b @ a``, b (out, rank) and a (rank, in)."""

    b: Tensor
    a: Tensor
    scale: float


@dataclass(frozen=True)
class Result:
    """The merged change, ``scale * b @ a``, and which fraction of the squared norm of the true merge it keeps (1: it is exact)."""

    b: Tensor
    a: Tensor
    scale: float
    kept: float = 1.0


def concatenated(parts: Sequence[Part], coefficients: Sequence[float]) -> Result:
    """``sum_i c_i scale_i b_i a_i`` exactly, by factors side by side: the ranks add up.

    The largest factor goes into the scale, so that equal ones leave the factors as they are.
    """
    factors = [c * part.scale for c, part in zip(coefficients, parts)]
    scale = max(factors, key=abs)
    if scale == 0.0:
        scale = 1.0
    a = [part.a if f == scale else widened(part.a)[0] * (f / scale) for f, part in zip(factors, parts)]
    return Result(torch.cat(_alike([part.b for part in parts]), dim=1), torch.cat(_alike(a), dim=0), scale)


def is_exact(parts: Sequence[Part], coefficients: Sequence[float]) -> bool:
    """Whether :func:`concatenated` multiplies by powers of two alone, so that its factors fit the inputs' dtype."""
    factors = [c * part.scale for c, part in zip(coefficients, parts)]
    scale = max(factors, key=abs) or 1.0
    return all(f == 0.0 or math.frexp(abs(f / scale))[0] == 0.5 for f in factors)


def nearest(parts: Sequence[Part], coefficients: Sequence[float], rank: int | None, energy: float | None) -> Result:
    """The nearest change of a lower rank to ``sum_i c_i scale_i b_i a_i``, from the thin factors."""
    whole = concatenated(parts, coefficients)
    b, a, kept = factor_product(whole.b, whole.a.double() * whole.scale, rank, energy)
    return Result(b, a, 1.0, kept)


def merged_products(
    parts: Sequence[Part | None], shape: tuple[int, int], method: Method, parameters: Mapping[str, Any], name: str, rank: int | None,
    energy: float | None,
) -> Result:  # fmt: skip
    """The products merged by a method, as the weights of whole models are, and the nearest change of a lower rank to the result.

    Args:
        parts: None for an adapter that does not change the module.
        shape: (out, in) of the product.
    """
    matrices = [torch.zeros(shape) if part is None else product(*_two(part), part.scale) for part in parts]
    if len({m.dtype for m in matrices}) > 1:
        matrices = [m.double() for m in matrices]
    b, a, kept = factor_matrix(_call(method, matrices, parameters, name), rank, energy)
    return Result(b, a, 1.0, kept)


def merged_factors(parts: Sequence[Part], weights: Sequence[float], method: Method, parameters: Mapping[str, Any], name: str) -> Result:
    """Both factors merged each by itself, as PEFT does it. The product of merged factors is not the merge of the products.

    A weight is split as sqrt(|w|) onto both sides, its sign onto A.
    """
    factors = [w * part.scale for w, part in zip(weights, parts)]
    roots = tuple(math.sqrt(abs(f)) for f in factors)
    signed = tuple(math.copysign(root, f) for root, f in zip(roots, factors))
    a = _call(method, widened(*(part.a for part in parts)), {**parameters, "weights": signed}, f"{name}.lora_A.weight")
    b = _call(method, widened(*(part.b for part in parts)), {**parameters, "weights": roots}, f"{name}.lora_B.weight")
    return Result(b, a, 1.0)


def _call(method: Method, tensors: list[Tensor], parameters: Mapping[str, Any], name: str) -> Tensor:
    base = None if method.base == "model" else torch.zeros_like(tensors[0])
    tensors = [t.contiguous() for t in tensors]
    return method.tensor(base, tensors, name=name, dtype=tensors[0].dtype, out=None, check_finite=True, **parameters)


def _two(part: Part) -> tuple[Tensor, Tensor]:
    b, a = widened(part.b, part.a)
    return b.contiguous(), a.contiguous()


def _alike(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors if len({t.dtype for t in tensors}) == 1 else widened(*tensors)
