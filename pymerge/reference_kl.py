"""The oracle of :mod:`pymerge.kl_ops`: divergences between rows of logits in plain torch, in fp32, or in fp64 when an input is fp64.

q = softmax(student / T), p = softmax(teacher / T), m = beta p + (1 - beta) q:

    forward   KL(p || q) = sum p (log p - log q)
    reverse   KL(q || p) = sum q (log q - log p)
    jsd       beta KL(p || m) + (1 - beta) KL(q || m)

An entry where a distribution is 0 contributes 0 to an expectation under it, whatever the other one is there; weight where the other
distribution has none makes a divergence infinite. docs/kl.md has the gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import compute_dtype

__all__ = ["backward", "forward"]


def forward(
    student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5, temperature: float = 1.0, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Divergence per row, and what :func:`backward` needs.

    Args:
        student: logits ``[rows, vocab]``, any floating dtype; NaN or +inf in a row makes its result NaN.
        teacher: logits of the same shape.
        kind: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        weight: fp32 ``[rows]``, multiplies the rows' results; where it is 0 the result is 0 and the logits do not matter.

    Returns:
        The divergences ``[rows]``, and ``[rows, 6]``: maximum and log of the sum of exponentials of the student and of the teacher,
        E_q[log q - log p or log m] and E_p[log p - log q or log m], 0 where no gradient has such a term.
    """
    log_q, log_p = _log_softmax(student, teacher, temperature)
    zero = log_q.new_zeros(log_q.shape[0])
    if kind == "forward":
        student_mean, teacher_mean = zero, _expectation(log_p, log_p - log_q)
        divergence = teacher_mean
    elif kind == "reverse":
        student_mean, teacher_mean = _expectation(log_q, log_q - log_p), zero
        divergence = student_mean
    else:
        log_m = _log_mixture(log_p, log_q, beta)
        student_mean, teacher_mean = _expectation(log_q, log_q - log_m), _expectation(log_p, log_p - log_m)
        divergence = beta * teacher_mean + (1 - beta) * student_mean
    stats = torch.stack([*_sums(student, temperature, log_q), *_sums(teacher, temperature, log_p), student_mean, teacher_mean], dim=1)
    divergence = divergence.clamp(min=0)  # rounding can leave it a little below
    if weight is not None:
        divergence = torch.where(weight == 0, 0, weight * divergence)
        stats = torch.where(weight[:, None] == 0, 0, stats)
    return divergence, stats


def backward(
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    grad: Tensor,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    of_teacher: bool = False,
) -> Tensor:
    """The gradient ``[rows, vocab]`` of ``sum(grad * divergence)`` with respect to the student's logits, or the teacher's.

    In the dtype of those logits. Exactly 0 in rows of weight 0 and where a logit is -inf. Where a divergence is infinite and its gradient
    would contain it, NaN.
    """
    log_q, log_p = _log_softmax(student, teacher, temperature)
    own, other, mean = (log_p, log_q, stats[:, 5:]) if of_teacher else (log_q, log_p, stats[:, 4:5])
    mean = torch.where(mean == math.inf, math.nan, mean)
    if kind == "jsd":
        own_weight = beta if of_teacher else 1 - beta
        d = own_weight * own.exp() * (own - _log_mixture(log_p, log_q, beta) - mean)
    elif (kind == "reverse") != of_teacher:
        d = own.exp() * (own - other - mean)
    else:
        d = own.exp() - other.exp()
    if kind == "jsd" or (kind == "reverse") != of_teacher:
        d = torch.where(own.exp() == 0, 0, d)
    d = d * (grad / temperature)[:, None]
    if weight is not None:
        d = torch.where(weight[:, None] == 0, 0, d * weight[:, None])
    return d.to(teacher.dtype if of_teacher else student.dtype)


def _log_softmax(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype([student, teacher])
    return tuple((logits.to(dtype) / temperature).log_softmax(dim=-1) for logits in (student, teacher))


def _sums(logits: Tensor, temperature: float, log_softmax: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum, and log of the sum of ``exp((logit - maximum) / temperature)``, which is minus the largest log probability."""
    return logits.to(log_softmax.dtype).amax(dim=-1), -log_softmax.amax(dim=-1)


def _expectation(log_p: Tensor, log_ratio: Tensor) -> Tensor:
    # 0 * inf: a probability that is not 0, but too small for the dtype, still makes an infinite ratio's product infinite.
    terms = torch.where(log_ratio == math.inf, math.inf, log_p.exp() * log_ratio)
    return torch.where(log_p == -math.inf, 0, terms).sum(dim=-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
