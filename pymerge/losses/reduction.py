"""From one number per token to a loss: which tokens count, and what the sum is divided by. Shared by all losses."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "divisor", "reduce", "token_mask"]

REDUCTIONS = ("token_mean", "sum", "batch_mean", "none")


def token_mask(shape: torch.Size, device: torch.device, mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Weights of the tokens, None for all alike: `mask`, and 0 where a label is `ignore_index`.

    Raises:
        ValueError: a mask or labels of another shape.
    """
    for what, t in (("mask", mask), ("labels", labels)):
        if t is not None and t.shape != shape:
            raise ValueError(f"{what} is {tuple(t.shape)}, the tokens are {tuple(shape)}")
    if labels is None:
        return mask
    kept = (labels != ignore_index).to(device)
    return kept if mask is None else kept & mask if mask.dtype == torch.bool else kept * mask


def divisor(
    weights: Tensor | None, shape: torch.Size, device: torch.device, reduction: str, num_items: float | Tensor | None
) -> Tensor | float:
    """What the sum over tokens is divided by; at least 1 item, so that no tokens give 0 and not NaN.

    Raises:
        ValueError: an unknown reduction, or `num_items` with one that it has no place in.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(map(repr, REDUCTIONS))}")
    if num_items is not None:
        if reduction != "token_mean":
            raise ValueError(f"num_items is the number of tokens to divide by, which reduction={reduction!r} does not do")
        return num_items
    if reduction == "batch_mean":
        return float(max(shape[0] if shape else 1, 1))
    if reduction == "token_mean":
        if weights is None:
            return float(max(shape.numel(), 1))
        total = weights.sum(dtype=torch.float32)
        return torch.where(total == 0, torch.ones_like(total), total)
    return 1.0


def reduce(per_token: Tensor, weights: Tensor | None, reduction: str, num_items: float | Tensor | None) -> Tensor:
    """`per_token`, weighted already, as the loss that `reduction` asks for."""
    by = divisor(weights, per_token.shape, per_token.device, reduction, num_items)
    return per_token if reduction == "none" else per_token.sum() / by
