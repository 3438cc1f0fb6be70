"""Gradients bent so that they do not raise the loss of remembered samples: GEM and A-GEM. Status: academic."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["agem_project", "gem_project"]


def gem_project(gradient: Tensor, memories: Tensor, *, margin: float = 0.0, tolerance: float = 1e-10) -> Tensor:
    """The gradient nearest to `gradient` that has no negative product with any memory's (Lopez-Paz and Ranzato 2017, eq. 8-12).

    Solves the dual, ``min 1/2 v G G' v + g G' v`` over ``v >= margin``, one coordinate at a time, in fp64.

    Args:
        gradient: ``[parameters]``, flat.
        memories: ``[tasks, parameters]``, the gradients on the memories of earlier tasks.
        margin: lower bound of v; above 0 it leans towards the memories (the authors' code: 0.5).
        tolerance: relative change of v at which to stop.

    Returns:
        ``[parameters]``; `gradient` itself when no product is negative and margin is 0.
    """
    if gradient.dim() != 1 or memories.dim() != 2 or memories.shape[1] != gradient.shape[0]:
        raise ValueError(f"the gradient is {tuple(gradient.shape)}, memories are {tuple(memories.shape)}; [n] and [tasks, n] are needed")
    if margin < 0:
        raise ValueError(f"margin is {margin}; it must not be negative")
    g, memory = gradient.double(), memories.double()
    products = memory @ g
    if margin == 0 and bool((products >= 0).all()):
        return gradient
    gram = memory @ memory.t()
    v = torch.full((len(memory),), margin, dtype=torch.float64, device=g.device)
    for _ in range(10_000):
        before = v.clone()
        for i in range(len(v)):
            if gram[i, i] > 0:
                v[i] = torch.clamp(v[i] - (gram[i] @ v + products[i]) / gram[i, i], min=margin)
        if (v - before).abs().max() <= tolerance * v.abs().max().clamp(min=1e-300):
            break
    return (g + memory.t() @ v).to(gradient.dtype)


def agem_project(gradient: Tensor, reference: Tensor) -> Tensor:
    """`gradient` without its part against the mean gradient of the memory (Chaudhry et al. 2019, arXiv:1812.00420, eq. 11); unchanged when
    it has none.

    Args:
        gradient, reference: of the same shape.
    """
    if gradient.shape != reference.shape:
        raise ValueError(f"the gradient is {tuple(gradient.shape)}, the reference {tuple(reference.shape)}")
    product = (gradient * reference).sum()
    return gradient - (product / reference.square().sum()) * reference if product < 0 else gradient
