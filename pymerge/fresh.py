"""Memory for results that nobody gave a place for.

The system gives out fresh memory by pages of 4 KB as it is first written, and for a large result that takes longer than the merge. In pages
of 2 MB a linear merge that allocates is 2.5 times as fast, and TIES 1.8 times (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["LARGE", "empty", "in_large_pages"]

LARGE = 4 << 20
"""Bytes from which on a result is worth asking for large pages: some of them lie in it whole."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, in large pages where it is large."""
    return in_large_pages(torch.empty(shape, dtype=dtype, device=device))


def in_large_pages(t: Tensor) -> Tensor:
    """`t`, untouched so far, and to be in large pages where it is large, in CPU memory, and the system has them (Linux)."""
    if _advise is not None and t.nbytes >= LARGE and t.device.type == "cpu" and type(t) is Tensor:
        begin, end = -(-t.data_ptr() // mmap.PAGESIZE), (t.data_ptr() + t.nbytes) // mmap.PAGESIZE
        _advise(begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)  # where it is refused all works as before
    return t


def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


_advise = _madvise()
