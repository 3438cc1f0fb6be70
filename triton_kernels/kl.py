"""Divergences between rows of logits, and their gradients: :mod:`pymerge.reference_kl` for CUDA tensors that are not fp64.

Forward: one program per row walks over the vocabulary in blocks, keeping maximum, sum of exponentials and the divergence's sum of both
models up to date (jsd walks twice, as a mixture needs both normalisers; the second time the row is in the second-level cache). Backward:
one program per row and block, no reductions. Blocks of 4096 with 8 warps are 16 elements a thread: wider ones spill.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "NUM_WARPS", "backward", "backward_kernel", "forward", "forward_block", "forward_kernel"]

BLOCK = 4096
JSD_BLOCK = 2048  # of the forward pass of jsd, whose second walk over the row spills on sm_100 with fp32 logits and more
NUM_WARPS = 8
_KIND = {"forward": 0, "reverse": 1, "jsd": 2}
_FORWARD = tl.constexpr(0)
_REVERSE = tl.constexpr(1)
_JSD = tl.constexpr(2)
_INF = tl.constexpr(float("inf"))
# The interpreter truncates where a GPU rounds to nearest even.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0; by its series where the difference would cancel."""
    series = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
    return tl.where(x > -0.3, series, tl.exp(x) - 1)


@triton.jit
def _log1p(y):
    """log(1 + y) for -1 < y <= 0; where the sum would round, 2 atanh(y / (2 + y)) by its series."""
    z = y / (2 + y)
    u = z * z
    series = 2 * z * (1 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9)))))
    return tl.where(y > -0.3, series, tl.log(1 + y))


@triton.jit
def _ratios_to_mixture(log_a, log_b, w_a, w_b):
    """log a - log m and log b - log m for m = w_a a + w_b b.

    With d = log b - log a <= 0, log m = log a + log(1 + w_b (e^d - 1)); where d > 0, the roles are exchanged. Always finite, also where a
    probability is 0, and where both are and d is NaN.
    """
    d = log_b - log_a
    b_larger = d > 0
    distance = tl.where(b_larger, -d, d)
    distance = tl.where(distance > -86.0, distance, -86.0)
    log = _log1p(tl.where(b_larger, w_a, w_b) * _expm1(distance))
    return tl.where(b_larger, distance, 0.0) - log, tl.where(b_larger, 0.0, distance) - log


@triton.jit
def _scaled(x, largest, inverse_temperature):
    """Differences to the maximum, or to 0 while there was nothing but -inf."""
    return (x - tl.where(largest == -_INF, 0.0, largest)) * inverse_temperature


@triton.jit
def forward_kernel(
    a, b, weight, loss, stats, vocab, inverse_temperature, w_a, w_b,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KL(a || b), a the teacher for the forward divergence and the student otherwise; or w_a KL(a || m) + w_b KL(b || m)."""
    row = tl.program_id(0).to(tl.int64)
    row_weight = tl.full((), 1.0, tl.float32)
    if WEIGHTED:
        row_weight = tl.load(weight + row)
    entries = tl.where(row_weight == 0, 0, vocab)  # rows of weight 0 are not read
    lane = tl.arange(0, BLOCK)
    a += row * vocab
    b += row * vocab
    max_a = -_INF
    max_b = -_INF
    sum_a = 0.0
    sum_b = 0.0
    cross = 0.0
    for first in range(0, entries, BLOCK):
        inside = first + lane < entries
        x = tl.load(a + first + lane, mask=inside, other=-_INF).to(tl.float32)
        y = tl.load(b + first + lane, mask=inside, other=-_INF).to(tl.float32)
        new_a = tl.maximum(max_a, tl.max(x, 0))
        new_b = tl.maximum(max_b, tl.max(y, 0))
        change_a = tl.where(max_a == -_INF, 0.0, (max_a - new_a) * inverse_temperature)
        change_b = tl.where(max_b == -_INF, 0.0, (max_b - new_b) * inverse_temperature)
        max_a = new_a
        max_b = new_b
        u = _scaled(x, max_a, inverse_temperature)
        v = _scaled(y, max_b, inverse_temperature)
        exp_u = tl.exp(u)
        if KIND != _JSD:
            term = tl.where(u == -_INF, 0.0, tl.where(v == -_INF, _INF, exp_u * (u - v)))
            moved = (cross + sum_a * (change_a - change_b)) * tl.exp(change_a)
            cross = tl.where(cross == _INF, cross, moved) + tl.sum(term, 0)
        sum_a = sum_a * tl.exp(change_a) + tl.sum(exp_u, 0)
        sum_b = sum_b * tl.exp(change_b) + tl.sum(tl.exp(v), 0)
    log_a = tl.log(sum_a)
    log_b = tl.log(sum_b)
    mean_a = cross / sum_a - log_a + log_b
    mean_b = 0.0
    divergence = mean_a
    if KIND == _JSD:
        mean_a = 0.0
        for first in range(0, entries, BLOCK):
            inside = first + lane < entries
            x = tl.load(a + first + lane, mask=inside, other=-_INF).to(tl.float32)
            y = tl.load(b + first + lane, mask=inside, other=-_INF).to(tl.float32)
            u = _scaled(x, max_a, inverse_temperature) - log_a
            v = _scaled(y, max_b, inverse_temperature) - log_b
            ratio_a, ratio_b = _ratios_to_mixture(u, v, w_a, w_b)
            mean_a += tl.sum(tl.exp(u) * ratio_a, 0)
            mean_b += tl.sum(tl.exp(v) * ratio_b, 0)
        divergence = w_a * mean_a + w_b * mean_b
        # NaN in one model's logits spoils both gradients, though the ratio, finite as it is, shows it in one sum only.
        mean_a = tl.where(divergence == divergence, mean_a, divergence)
        mean_b = tl.where(divergence == divergence, mean_b, divergence)
    divergence = tl.where(divergence < 0, 0.0, divergence)  # rounding can leave it a little below
    masked = row_weight == 0
    tl.store(loss + row, tl.where(masked, 0.0, row_weight * divergence))
    stats += row * 6
    at_a: tl.constexpr = 2 if KIND == _FORWARD else 0
    tl.store(stats + at_a, tl.where(masked, 0.0, max_a))
    tl.store(stats + at_a + 1, tl.where(masked, 0.0, log_a))
    tl.store(stats + 2 - at_a, tl.where(masked, 0.0, max_b))
    tl.store(stats + 3 - at_a, tl.where(masked, 0.0, log_b))
    tl.store(stats + 4 + at_a // 2, tl.where(masked, 0.0, mean_a))
    tl.store(stats + 5 - at_a // 2, tl.where(masked, 0.0, mean_b))


@triton.jit
def backward_kernel(
    own, other, weight, stats, grad, out, vocab, inverse_temperature, w_own, w_other,
    SHAPE: tl.constexpr, OF_TEACHER: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one model's logits. SHAPE: "difference", "centred" or "mixture" (docs/kl.md). `out` may be `own`."""
    row = tl.program_id(0).to(tl.int64)
    row_weight = tl.full((), 1.0, tl.float32)
    if WEIGHTED:
        row_weight = tl.load(weight + row)
    masked = row_weight == 0
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    read = at < tl.where(masked, 0, vocab)
    x = tl.load(own + row * vocab + at, mask=read, other=-_INF).to(tl.float32)
    y = tl.load(other + row * vocab + at, mask=read, other=-_INF).to(tl.float32)
    stats += row * 6
    at_own: tl.constexpr = 2 if OF_TEACHER else 0
    log_a = (x - tl.load(stats + at_own)) * inverse_temperature - tl.load(stats + at_own + 1)
    log_b = (y - tl.load(stats + 2 - at_own)) * inverse_temperature - tl.load(stats + 3 - at_own)
    factor = tl.load(grad + row) * row_weight * inverse_temperature
    mean = tl.load(stats + 4 + at_own // 2)
    mean = tl.where(mean == _INF, float("nan"), mean)  # an infinite divergence has no such gradient
    p = tl.exp(log_a)
    if SHAPE == "difference":
        d = (p - tl.exp(log_b)) * factor
    elif SHAPE == "centred":
        d = tl.where(p == 0, 0.0, p * (log_a - log_b - mean) * factor)
    else:
        ratio, _ = _ratios_to_mixture(log_a, log_b, w_own, w_other)
        d = tl.where(p == 0, 0.0, p * (ratio - mean) * (factor * w_own))
    d = tl.where(masked, 0.0, d)
    if _INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        bits = d.to(tl.uint32, bitcast=True)
        d = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    tl.store(out + row * vocab + at, d.to(out.dtype.element_ty), mask=inside)


def forward(
    student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5, temperature: float = 1.0, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`pymerge.reference_kl.forward`; contiguous tensors."""
    rows, vocab = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    stats = torch.empty(rows, 6, dtype=torch.float32, device=student.device)
    if rows:
        a, b = (teacher, student) if kind == "forward" else (student, teacher)
        with torch.cuda.device_of(student):  # Triton launches on the current device
            forward_kernel[(rows,)](
                a, b, loss if weight is None else weight, loss, stats, vocab, 1.0 / temperature, 1.0 - beta, beta,
                KIND=_KIND[kind], WEIGHTED=weight is not None, BLOCK=_block(vocab, forward_block(kind)),
                num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return loss, stats


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
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`pymerge.reference_kl.backward`; into `out`, which may be the logits themselves, if given. Contiguous tensors."""
    rows, vocab = student.shape
    own, other, w_own = (teacher, student, beta) if of_teacher else (student, teacher, 1.0 - beta)
    if out is None:
        out = torch.empty_like(own)
    if rows:
        shape = "mixture" if kind == "jsd" else "centred" if (kind == "reverse") != of_teacher else "difference"
        block = _block(vocab, BLOCK)
        with torch.cuda.device_of(student):
            backward_kernel[(rows, triton.cdiv(vocab, block))](
                own, other, grad if weight is None else weight, stats, grad, out, vocab, 1.0 / temperature, w_own, 1.0 - w_own,
                SHAPE=shape, OF_TEACHER=of_teacher, WEIGHTED=weight is not None, BLOCK=block, num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def forward_block(kind: str) -> int:
    """Entries of a row that the forward pass works on at a time, at most."""
    return JSD_BLOCK if kind == "jsd" else BLOCK


def _block(vocab: int, most: int) -> int:
    # A vocabulary shorter than a warp's lanes would only cost more compiled variants.
    return min(most, max(256, triton.next_power_of_2(vocab)))
