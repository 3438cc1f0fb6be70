"""The same divergence from hidden states and output layers, a chunk of tokens at a time: logits of all tokens never exist at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kl_ops
from .reduction import divisor, token_mask

__all__ = ["linear_kl_divergence"]

CHUNK_BYTES = 256 * 2**20  # of both models' logits of a chunk


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: str = "reverse",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = False,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "token_mean",
    num_items: float | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """:func:`kl_divergence` of ``hidden @ weight.T + bias`` and ``ref_hidden @ ref_weight.T + ref_bias``.

    The logits of `chunk_tokens` tokens are made, compared, turned into their gradient in place, and multiplied back, all before the next
    chunk. Memory beyond the gradients of `hidden` and `weight` is two chunks of logits and, where `weight` needs a gradient, an fp32 sum of
    it.

    Args:
        hidden, ref_hidden: ``[..., width]`` and ``[..., ref width]``; widths may differ.
        weight, ref_weight: ``[vocab, width]`` and ``[vocab, ref width]``, of the hidden states' dtypes.
        bias, ref_bias: ``[vocab]``.
        chunk_tokens: tokens at a time; by default as many as take 256 MiB of logits.
        direction, beta, temperature, scale_by_t2, labels, mask, ignore_index, reduction, num_items: as :func:`kl_divergence` has them.

    Returns:
        As :func:`kl_divergence`. The reference gets no gradient. Tokens with weight 0 are not computed at all.

    Raises:
        ValueError, TypeError: shapes, dtypes or settings do not fit.
    """
    _check(hidden, weight, bias, "")
    _check(ref_hidden, ref_weight, ref_bias, "ref_")
    if hidden.shape[:-1] != ref_hidden.shape[:-1]:
        raise ValueError(f"hidden is {tuple(hidden.shape)}, ref_hidden {tuple(ref_hidden.shape)}: they must be of the same tokens")
    if weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(f"the vocabularies have {weight.shape[0]} and {ref_weight.shape[0]} entries; cut a padded one to the common size")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; a chunk has at least one token")
    shape = hidden.shape[:-1]
    weights = token_mask(shape, hidden.device, mask, labels, ignore_index)
    by = divisor(weights, shape, hidden.device, reduction, num_items)
    flat = torch.ones(shape.numel(), device=hidden.device) if weights is None else weights.detach().reshape(-1).to(torch.float32)
    counted = torch.nonzero(flat).reshape(-1) if weights is not None else None
    if counted is not None and counted.numel() < flat.numel():
        hidden_rows, ref_rows = _rows(hidden)[counted], _rows(ref_hidden)[counted]
        row_weights = flat[counted]
    else:
        counted, hidden_rows, ref_rows, row_weights = None, _rows(hidden), _rows(ref_hidden), flat
    size = weight.shape[0] * (hidden.element_size() + ref_hidden.element_size())
    setting = _Setting(direction, beta, temperature, chunk_tokens or max(16, CHUNK_BYTES // size))
    factor = temperature**2 if scale_by_t2 else 1.0
    scale = row_weights * factor if reduction == "none" else row_weights * (factor / by)
    ref = (ref_rows.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach())
    per_row = _LinearDivergence.apply(hidden_rows, weight, bias, *ref, scale, reduction != "none", setting)
    if reduction != "none":
        return per_row
    if counted is not None:
        per_row = per_row.new_zeros(flat.numel()).index_put((counted,), per_row)
    return per_row.view(shape)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, which: str) -> None:
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{which}hidden is {tuple(hidden.shape)}, {which}weight {tuple(weight.shape)}: they must be [..., width] and [vocab, width]"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(f"{which}hidden is {hidden.dtype}, {which}weight {weight.dtype}; they must have one dtype, as in the layer itself")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{which}bias is {tuple(bias.shape)}, the vocabulary has {weight.shape[0]} entries")


@dataclass(frozen=True)
class _Setting:
    direction: str
    beta: float
    temperature: float
    chunk: int


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


class _LinearDivergence(torch.autograd.Function):
    """scale * divergence by row, or its sum. The sum's gradients are made on the way, as their size is known up to one factor."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scale, summed, setting):
        kl_ops.check_choices(setting.direction, setting.beta, setting.temperature)
        ctx.setting, ctx.summed, ctx.wanted = setting, summed, ctx.needs_input_grad[:3]
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scale)
        sums = _Gradients(hidden, weight, bias, ctx.wanted) if summed and any(ctx.wanted) else None
        wide = torch.float64 if torch.float64 in (hidden.dtype, ref_hidden.dtype) else torch.float32
        result = hidden.new_zeros((), dtype=wide) if summed else hidden.new_empty(hidden.shape[0], dtype=wide)
        for rows in _chunks(hidden.shape[0], setting.chunk):
            logits = _logits(hidden[rows], weight, bias)
            loss, logits = _chunk(logits, _logits(ref_hidden[rows], ref_weight, ref_bias), scale[rows], setting, sums is not None)
            if summed:
                result += loss.sum()
            else:
                result[rows] = loss
            if sums is not None:
                sums.add(rows, logits)
        ctx.gradients = sums.done() if sums is not None else None
        return result

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scale = ctx.saved_tensors
        if ctx.summed:
            # Not multiplied in place: the graph may be used again.
            return (*(None if g is None else g * grad.to(g.dtype) for g in ctx.gradients), *(None,) * 6)
        sums = _Gradients(hidden, weight, bias, ctx.wanted)
        for rows in _chunks(hidden.shape[0], ctx.setting.chunk):
            logits = _logits(hidden[rows], weight, bias)
            _, logits = _chunk(logits, _logits(ref_hidden[rows], ref_weight, ref_bias), scale[rows] * grad[rows], ctx.setting, True)
            sums.add(rows, logits)
        return (*sums.done(), *(None,) * 6)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def _chunk(logits: Tensor, ref_logits: Tensor, scale: Tensor, setting: _Setting, gradient: bool) -> tuple[Tensor, Tensor]:
    """The scaled divergences of a chunk, and its logits, overwritten by their gradient if that is wanted."""
    choices = (setting.direction, setting.beta, setting.temperature)
    loss, stats = torch.ops.pymerge.kl_divergence_forward(logits, ref_logits, *choices)
    if gradient:
        torch.ops.pymerge.kl_divergence_backward_(logits, ref_logits, stats, scale.to(loss.dtype), *choices)
    return loss * scale, logits


class _Gradients:
    """Gradients of hidden states, weight and bias; sums over chunks in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted) -> None:
        self._of, self._x, self._w = wanted, hidden, weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if wanted[2] else None
        self._bias_dtype = None if bias is None else bias.dtype

    def add(self, rows: slice, gradient: Tensor) -> None:
        if self.hidden is not None:
            torch.mm(gradient, self._w, out=self.hidden[rows])
        if self.weight is not None:
            self.weight += gradient.t() @ self._x[rows]
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def done(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.to(self._w.dtype)
        return self.hidden, weight, None if self.bias is None else self.bias.to(self._bias_dtype)
