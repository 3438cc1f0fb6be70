"""The C++ backend of :mod:`pymerge.diagnose_ops`: the results of :mod:`pymerge.reference_diagnose`, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import _arg, _core, _wide

__all__ = ["diagnose"]


def diagnose(
    base: Tensor | None, models: Sequence[Tensor], selection: Tensor, sums: Tensor, counts: Tensor, threads: int | None = None
) -> None:
    """See :func:`pymerge.reference_diagnose.diagnose`; tensors flat and contiguous."""
    rows = [tuple(row) for row in selection.tolist()]
    n, f64 = models[0].numel(), _wide([base, *models])
    arguments = (n, f64, _arg(base), [_arg(x) for x in models], rows, sums.data_ptr(), counts.data_ptr())
    _core.diagnose(*arguments, threads or torch.get_num_threads())
