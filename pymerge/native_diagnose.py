"""The C++ backend of :mod:`pymerge.diagnose_ops`: the results of :mod:`pymerge.reference_diagnose`, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import _DTYPE, _arg, _core, _wide

__all__ = ["FilePart", "diagnose", "diagnose_files"]

FilePart = tuple[int, int, torch.dtype]
"""Descriptor of an open file, byte of the first element, dtype."""


def diagnose(
    base: Tensor | None, models: Sequence[Tensor], selection: Tensor, sums: Tensor, counts: Tensor, threads: int | None = None
) -> None:
    """See :func:`pymerge.reference_diagnose.diagnose`; tensors flat and contiguous."""
    rows = [tuple(row) for row in selection.tolist()]
    n, f64 = models[0].numel(), _wide([base, *models])
    arguments = (n, f64, _arg(base), [_arg(x) for x in models], rows, sums.data_ptr(), counts.data_ptr())
    _core.diagnose(*arguments, threads or torch.get_num_threads())


def diagnose_files(
    n: int, base: FilePart | None, models: Sequence[FilePart], selection: Sequence[Sequence[int]], sums: Tensor, counts: Tensor
) -> int:
    """The same of `n` elements that lie in open files, read on this thread a little at a time.

    Args:
        n: elements.
        base, models: where they lie.
        selection: a (key, cut) per model.

    Returns:
        The index of what could not be read, the base counting as the first; `sums` and `counts` are void then. -1: all is well.
    """
    parts = [*([] if base is None else [base]), *models]
    arguments = [(file, offset, _DTYPE[dtype]) for file, offset, dtype in parts]
    wide = any(dtype == torch.float64 for _, _, dtype in parts)
    return _core.diagnose_files(n, wide, base is not None, arguments, [tuple(s) for s in selection], sums.data_ptr(), counts.data_ptr())
