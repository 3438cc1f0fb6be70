"""The usual sum of a label loss and a divergence from a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses.divergence import kl_divergence
from ..losses.reduction import reduce, token_mask
from .topk import TopK, log_probs_at, topk_divergence

__all__ = ["distillation_loss"]


def distillation_loss(
    logits: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.5,
    direction: str = "forward",
    temperature: float = 1.0,
    scale_by_t2: bool = False,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: str = "token_mean",
    num_items: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``(1 - alpha) * cross entropy with the labels + alpha * divergence from the teacher`` (Hinton et al. 2015).

    Args:
        logits: of the student, ``[..., vocab]``.
        teacher: logits of the same shape (of :meth:`TeacherEnsemble.logits`, for instance), or a :class:`TopK`, which also needs ``tail=``.
        labels: ``[...]``, aligned with the logits (nothing is shifted); needed unless `alpha` is 1, and their `ignore_index` masks both
            terms.
        alpha: the divergence's share, in [0, 1].
        direction, temperature, scale_by_t2: of the divergence; cross entropy is at temperature 1.
        mask, reduction, num_items: as :func:`pymerge.losses.kl_divergence` has them, for both terms.
        options: further ones of :func:`pymerge.losses.kl_divergence` or :func:`topk_divergence`.

    Raises:
        ValueError: alpha is outside [0, 1], or labels are missing.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it is the divergence's share, between 0 and 1")
    if labels is None and alpha < 1:
        raise ValueError("cross entropy needs labels; pass them, or alpha=1 for the divergence alone")
    shared = {"labels": labels, "mask": mask, "ignore_index": ignore_index, "reduction": reduction, "num_items": num_items}
    divergence = topk_divergence if isinstance(teacher, TopK) else kl_divergence
    choices = {"direction": direction, "temperature": temperature, "scale_by_t2": scale_by_t2}
    distance = divergence(logits, teacher, **choices, **shared, **options) if alpha > 0 else None
    if alpha == 1:
        return distance
    weights = token_mask(logits.shape[:-1], logits.device, mask, labels, ignore_index)
    per_token = -log_probs_at(logits, labels.clamp(min=0)[..., None])[..., 0]  # an ignored label need not be an entry
    per_token = torch.where(weights == 0, 0.0, per_token * weights)
    entropy = reduce(per_token, weights, reduction, num_items)
    return entropy if distance is None else (1 - alpha) * entropy + alpha * distance
