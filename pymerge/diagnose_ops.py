"""The diagnostics' reduction on a backend: the C++ core for CPU tensors, plain torch (:mod:`pymerge.reference_diagnose`) for others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference_diagnose
from .reference_diagnose import PIECE, count_counts, count_sums

__all__ = ["PIECE", "can_read", "count_counts", "count_sums", "diagnose", "diagnose_files", "new_statistics"]


def new_statistics(models: int) -> tuple[Tensor, Tensor]:
    """Zeros to add to: the sums, fp64, and the counts, int64, of :func:`pymerge.reference_diagnose.diagnose`."""
    return torch.zeros(count_sums(models), dtype=torch.float64), torch.zeros(count_counts(models), dtype=torch.int64)


def diagnose(
    base: Tensor | None, models: Sequence[Tensor], selection: Tensor, sums: Tensor, counts: Tensor, *, threads: int | None = None
) -> None:
    """:func:`pymerge.reference_diagnose.diagnose` of tensors of one shape; at most 64 models.

    Args:
        threads: that compute; torch's number by default. The results do not depend on it.

    Raises:
        ValueError: shapes or devices differ, too many models, or a forced backend that cannot do it: Triton has no such kernel, and GPU
            tensors go through plain torch.
        TypeError: a dtype that cannot be merged.
    """
    if not 1 <= len(models) <= 64:
        raise ValueError(f"{len(models)} models; 1 to 64 can be compared at once")
    ops._check_alike([*models, *([] if base is None else [base])])
    name = ops.backend_name(models[0].device)
    if name == "triton":
        if ops.forced_backend() is not None:
            raise ValueError("backend 'triton' has no kernel for diagnostics; choose 'reference' or none")
        name = "reference"
    flat_base, flat = None if base is None else ops._flat(base), [ops._flat(x) for x in models]
    if name == "native":
        from . import native_diagnose

        native_diagnose.diagnose(flat_base, flat, selection, sums, counts, threads)
    else:
        reference_diagnose.diagnose(flat_base, flat, selection, sums, counts)


def can_read(dtypes: Sequence[torch.dtype]) -> bool:
    """Whether :func:`diagnose_files` takes files of these dtypes with the backend that is in force."""
    return all(dtype in ops.COMPUTED for dtype in dtypes) and ops.backend_name(torch.device("cpu")) == "native"


def diagnose_files(*arguments) -> int:
    """:func:`pymerge.native_diagnose.diagnose_files`, where :func:`can_read`."""
    from . import native_diagnose

    return native_diagnose.diagnose_files(*arguments)
