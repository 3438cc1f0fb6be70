"""Teachers of which only the k largest probabilities are known: stored ones, or served ones.

What is known of the rest has to be decided, and programs decide differently, so it has a name (`tail`) and no default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.reduction import reduce, token_mask

__all__ = ["TopK", "top_k", "topk_divergence"]

CHUNK = 2**24  # logits at a time, in fp32


@dataclass(frozen=True)
class TopK:
    """The k most probable entries of a teacher's distribution.

    Attributes:
        indices: int64 ``[..., k]``, no entry twice in a row.
        logp: fp32 ``[..., k]``, their log-probabilities, whose probabilities sum to at most 1.
    """

    indices: Tensor
    logp: Tensor

    def __post_init__(self) -> None:
        if self.indices.shape != self.logp.shape or self.indices.dim() == 0:
            raise ValueError(f"indices are {tuple(self.indices.shape)}, log-probabilities {tuple(self.logp.shape)}: both are [..., k]")
        if self.logp.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"log-probabilities are {self.logp.dtype}; keep them in fp32: at 10, bf16 steps are 0.06")


def top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k most probable entries of ``softmax(logits / temperature)``, for storing; ``[..., vocab]`` to ``[..., k]``."""
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k is {k}; the vocabulary has {logits.shape[-1]} entries")
    with torch.no_grad():
        indices = torch.topk(logits, k, dim=-1).indices
        return TopK(indices, log_probs_at(logits, indices, temperature))


def topk_divergence(
    logits: Tensor,
    teacher: TopK,
    *,
    tail: str,
    direction: str = "forward",
    temperature: float = 1.0,
    scale_by_t2: bool = False,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "token_mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Divergence of a student from the k entries of a teacher that are known.

    ============= =========================================================== ===================================================
    tail          what is compared
    ============= =========================================================== ===================================================
    renormalize   teacher and student both given that the token is among the k nothing is learnt of the probability of the k together
    bucket        the k, and all others as one entry more                     the honest use of what is known
    zero          the teacher given the k, the student as it is               forward only: pushes all else towards 0
    ============= =========================================================== ===================================================

    Args:
        logits: of the student, ``[..., vocab]``.
        teacher: of the same tokens, its probabilities taken at the same `temperature`.
        tail: see above.
        direction: ``"forward"``, KL(teacher || student), or ``"reverse"``.
        temperature: of the student's softmax.
        scale_by_t2, labels, mask, ignore_index, reduction, num_items: as :func:`pymerge.losses.kl_divergence` has them.

    Raises:
        ValueError: shapes or settings do not fit.
    """
    if tail not in ("renormalize", "bucket", "zero"):
        raise ValueError(f"tail is {tail!r}; choose 'renormalize', 'bucket' or 'zero'")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction is {direction!r}; with the k largest only, choose 'forward' or 'reverse'")
    if tail == "zero" and direction == "reverse":
        raise ValueError("tail 'zero' gives the teacher no probability outside the k, so the reverse divergence is infinite; use 'bucket'")
    if logits.shape[:-1] != teacher.indices.shape[:-1]:
        raise ValueError(f"logits are {tuple(logits.shape)}, the teacher's entries {tuple(teacher.indices.shape)}: not the same tokens")
    log_q = log_probs_at(logits, teacher.indices, temperature)
    log_p = teacher.logp.to(log_q.device)
    if tail == "renormalize":
        log_q = log_q - torch.logsumexp(log_q, -1, keepdim=True)
    if tail == "bucket":
        log_p, log_q = _with_rest(log_p), _with_rest(log_q)
    else:
        log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)
    a, b = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    per_token = torch.where(a == -torch.inf, 0.0, a.exp() * (a - b)).sum(-1)
    weights = token_mask(logits.shape[:-1], logits.device, mask, labels, ignore_index)
    if weights is not None:
        per_token = torch.where(weights == 0, 0.0, per_token * weights)
    return reduce(per_token * temperature**2 if scale_by_t2 else per_token, weights, reduction, num_items)


def _with_rest(logp: Tensor) -> Tensor:
    """log(1 - sum) appended. Where the k have all the probability there is, as far as fp32 can tell, the rest is the smallest step of 1."""
    total = logp.exp().sum(-1, keepdim=True)
    smallest = torch.finfo(logp.dtype).eps / 2
    return torch.cat([logp, torch.log((1 - total).clamp(min=smallest))], -1)


def log_probs_at(logits: Tensor, indices: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at some entries, fp32, without a widened copy of the logits: ``[..., vocab]``, ``[..., k]`` to
    ``[..., k]``. The gradient is rounded to the logits' dtype once."""
    return _LogProbsAt.apply(logits, indices, temperature)


class _LogProbsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, indices, temperature):
        flat, places = logits.reshape(-1, logits.shape[-1]), indices.reshape(-1, indices.shape[-1])
        wide = torch.promote_types(logits.dtype, torch.float32)
        result, total = flat.new_empty(places.shape, dtype=wide), flat.new_empty((len(flat), 1), dtype=wide)
        for rows in _pieces(logits):
            scaled = flat[rows].to(wide) / temperature
            total[rows] = torch.logsumexp(scaled, -1, keepdim=True)
            result[rows] = scaled.gather(-1, places[rows]) - total[rows]
        ctx.save_for_backward(logits, places, total)
        ctx.temperature = temperature
        return result.view(indices.shape)

    @staticmethod
    def backward(ctx, grad):
        logits, places, total = ctx.saved_tensors
        flat, gradient = logits.reshape(-1, logits.shape[-1]), torch.empty_like(logits, memory_format=torch.contiguous_format)
        out, own = gradient.view(-1, logits.shape[-1]), grad.reshape(places.shape) / ctx.temperature
        for rows in _pieces(logits):
            wide = (flat[rows].to(total.dtype) / ctx.temperature).sub_(total[rows]).exp_().mul_(-own[rows].sum(-1, keepdim=True))
            out[rows] = wide.scatter_add_(-1, places[rows], own[rows])
        return gradient, None, None


def _pieces(logits: Tensor) -> list[slice]:
    """Rows that are widened at a time."""
    count, size = logits.shape[:-1].numel(), max(1, CHUNK // max(logits.shape[-1], 1))
    return [slice(begin, begin + size) for begin in range(0, count, size)]
