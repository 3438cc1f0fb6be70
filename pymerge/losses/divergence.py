"""The divergence between two models' next-token distributions, over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kl_ops  # noqa: F401 - registers the operator
from .reduction import reduce, token_mask

__all__ = ["kl_divergence"]


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "reverse",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = False,
    normalize: bool = False,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "token_mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """How far a model (the policy, the student) is from a reference (the base, the teacher), from their raw logits.

    ========= ================================================= =====================================================================
    direction value, q = softmax(logits / T), p = of ref_logits used for
    ========= ================================================= =====================================================================
    reverse   KL(q || p)                                        the term of RLHF; mode-seeking
    forward   KL(p || q)                                        distillation, staying near a base in fine-tuning; mass-covering
    jsd       beta KL(p || m) + (1 - beta) KL(q || m)           in between; m = beta p + (1 - beta) q (Agarwal et al. 2023)
    ========= ================================================= =====================================================================

    One read of the logits forward, one more backward, nothing of size tokens x vocabulary but the gradient (docs/kl.md). Both sides get
    gradients if they ask for them; detach the reference, or compute it without gradients.

    Args:
        logits: ``[..., vocab]``, fp32, bf16, fp16 or fp64; widened inside.
        ref_logits: of the same shape. Both must have gone through the same preprocessing (soft capping, scales), and padded vocabularies be
            cut to the common size.
        direction: see above.
        beta: of jsd, strictly between 0 and 1.
        temperature: T.
        scale_by_t2: multiply by T^2, so that gradients keep their size (Hinton et al. 2015).
        normalize: of jsd: divide by beta (1 - beta). It then tends to KL(p || q) for beta -> 0 and to KL(q || p) for beta -> 1; some
            programs mean these by beta 0 and 1.
        labels: integers ``[...]``; tokens whose label is `ignore_index` do not count. Nothing is shifted: position i of both logits is
            compared as it is.
        mask: booleans or weights ``[...]``.
        ignore_index: see labels.
        reduction: ``"token_mean"``: the sum over tokens by the sum of their weights; ``"sum"``; ``"batch_mean"``: by the size of the first
            dimension; ``"none"``: fp32 ``[...]``.
        num_items: divide by this instead, under ``"token_mean"``: the number of tokens of all micro-batches of a step, so that the loss
            does not depend on how they were split.

    Returns:
        fp32 (fp64 for fp64 logits). With no token that counts it is 0, with a graph behind it.

    Raises:
        ValueError, TypeError: shapes, dtypes or settings do not fit.
    """
    if normalize and direction != "jsd":
        raise ValueError("normalize is about beta, which only direction='jsd' has")
    if logits.dim() == 0:
        raise ValueError("logits are a single number; they must be [..., vocab]")
    weights = token_mask(logits.shape[:-1], logits.device, mask, labels, ignore_index)
    per_token = torch.ops.pymerge.kl_divergence(logits, ref_logits, direction, beta, temperature, weights)
    factor = (temperature**2 if scale_by_t2 else 1.0) / (beta * (1 - beta) if normalize else 1.0)
    return reduce(per_token if factor == 1.0 else per_token * factor, weights, reduction, num_items)
