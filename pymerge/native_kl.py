"""The C++ backend of :mod:`pymerge.kl_ops`: :mod:`pymerge.reference_kl` on contiguous CPU tensors that are not fp64.

Results agree with the oracle to the tolerance in docs/kl.md, and are the same, bit for bit, for every instruction set and number of
threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fresh
from .native import _arg, _core

__all__ = ["backward", "forward"]

_KIND = {"forward": 0, "reverse": 1, "jsd": 2}


def _options(kind: str, beta: float, temperature: float) -> dict:
    return {"kind": _KIND[kind], "beta": beta, "temperature": temperature}


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(
    student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5, temperature: float = 1.0, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`pymerge.reference_kl.forward`; `weight` is contiguous."""
    rows, vocab = student.shape
    loss, stats = torch.empty(rows, dtype=torch.float32), torch.empty(rows, 6, dtype=torch.float32)
    options = _options(kind, beta, temperature)
    addresses = (_address(weight), _address(stats), _address(loss))
    _core.kl_forward(rows, vocab, _arg(student), _arg(teacher), options, *addresses, torch.get_num_threads())
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
    """See :func:`pymerge.reference_kl.backward`; into `out`, which may be the logits themselves, if given. All tensors contiguous."""
    rows, vocab = student.shape
    if out is None:
        out = fresh.empty(student.shape, (teacher if of_teacher else student).dtype, student.device)
    options = _options(kind, beta, temperature)
    addresses = (_address(weight), _address(stats), _address(grad))
    _core.kl_backward(rows, vocab, _arg(student), _arg(teacher), options, *addresses, of_teacher, _arg(out), torch.get_num_threads())
    return out
