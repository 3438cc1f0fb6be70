"""The C++ backend on lists of tensors: one call for all of them, with the results of :mod:`pymerge.native` on each, bit for bit.

Tensors are contiguous, in CPU memory and of the dtypes that the core knows; of any shape, one size per row.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .native import _DTYPE, _ZERO_VOTE, _core, _options
from .spec import MergeSpec, tensor_id

__all__ = ["Row", "lerp_many", "merge_many", "non_finite"]


class Row(NamedTuple):
    """One merge: what a tensor is called, what goes in, and where the result goes."""

    name: str
    base: Tensor | None
    models: Sequence[Tensor]
    out: Tensor


def merge_many(rows: Sequence[Row], spec: MergeSpec, *, together: bool) -> list[int]:
    """:func:`pymerge.native.merge` of each row; returns which have a delta that is NaN or infinite.

    With `together`, ranks and tied elections are taken over all rows in their order; all of them or none have an input of fp64.
    """
    flat: list[int] = []
    for row in rows:
        flat += (row.out.numel(), 0, row.out.data_ptr(), _DTYPE[row.out.dtype])
        flat += (0, 0) if row.base is None else (row.base.data_ptr(), _DTYPE[row.base.dtype])
        for x in row.models:
            flat += (x.data_ptr(), _DTYPE[x.dtype])
    return merge_table(array("q", flat), [row.name for row in rows], spec, together=together)


def merge_table(table: array, names: Sequence[str], spec: MergeSpec, *, together: bool) -> list[int]:
    """:func:`merge_many` of a table's rows: size, 0, then an address and a dtype code for each of result, base (0: none) and models."""
    models, width, threads = len(spec.weights), 6 + 2 * len(spec.weights), torch.get_num_threads()
    sizes, counts = table[::width], array("q")
    if spec.sparsify == "bernoulli":
        table[1::width] = array("q", map(tensor_id, names))
    if spec.sparsify in ("magnitude", "band") and not (together and spec.trims):
        of_size = {n: [count for end in spec.counts(n) for count in end] for n in set(sizes)}
        for n in sizes:
            counts.extend(of_size[n])
    options = _options(spec, 0, "", None, None)
    if together and spec.trims:
        options["selection"] = _core.select_many(table, spec.counts(sum(sizes))[0], options["tie_all"], threads)
    if together and options["majority"]:
        positive = _core.vote_balance_many(table, models, counts, options, threads) > 0
        options |= {"majority": False, "zero_vote": _ZERO_VOTE["positive" if positive else "negative"]}
    return _core.merge_many(table, models, counts, options, threads)


def lerp_many(pairs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float) -> list[int]:
    """:func:`pymerge.native.lerp` of each (a, b, out); returns which have a difference that is NaN or infinite."""
    flat: list[int] = []
    for a, b, out in pairs:
        flat += (out.numel(), 0, out.data_ptr(), _DTYPE[out.dtype], a.data_ptr(), _DTYPE[a.dtype], b.data_ptr(), _DTYPE[b.dtype])
    return lerp_table(array("q", flat), alpha)


def lerp_table(table: array, alpha: float) -> list[int]:
    """:func:`lerp_many` of a table's rows (see :func:`merge_table`), from each base to its one model."""
    near_a = alpha < 0.5
    return _core.lerp_many(table, near_a, alpha if near_a else 1.0 - alpha, torch.get_num_threads())


def non_finite(tensors: Sequence[Tensor]) -> list[int]:
    """Which of the tensors have a NaN or an infinity."""
    flat: list[int] = []
    for t in tensors:
        flat += (t.numel(), 0, t.data_ptr(), _DTYPE[t.dtype], 0, 0)
    return _core.find_non_finite(array("q", flat), 0, 2, torch.get_num_threads())
