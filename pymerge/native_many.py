"""The C++ backend on lists of tensors: one call for all of them, with the results of :mod:`pymerge.native` on each, bit for bit.

Tensors are contiguous, in CPU memory and of the dtypes that the core knows; of any shape, one size per row.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .native import _DTYPE, _ZERO_VOTE, _core, _options
from .ops import PLAIN
from .spec import MergeSpec, tensor_id

__all__ = ["Row", "Table", "lerp_many", "merge_many", "non_finite"]


class Row(NamedTuple):
    """One merge: what a tensor is called, what goes in, and where the result goes."""

    name: str
    base: Tensor | None
    models: Sequence[Tensor]
    out: Tensor


class Table:
    """Merges as the core takes them, a row each: size, tensor id, then an address and a dtype code for each of result, base and models.

    A base's address is 0 where there is none. What a table points to is its user's to keep alive.
    """

    RESULT, BASE, MODELS = 2, 4, 6  # columns; the second model's is MODELS + 2

    def __init__(self, cells: array, models: int) -> None:
        self.cells, self.models, self.width = cells, models, self.MODELS + 2 * models

    @classmethod
    def read(cls, columns: Mapping[int, list[Tensor]], models: int) -> tuple[Table, bool] | None:
        """The table of tensors in `columns`, and whether each row has one dtype; None where they are not plain or not of one shape."""
        reader, rows = _reader(), len(next(iter(columns.values())))
        table = cls(array("q", bytes(8 * rows * (cls.MODELS + 2 * models))), models)
        same = None if reader is None else reader.read(table.cells, models, list(columns), list(columns.values()))
        return None if same is None else (table, same)

    @property
    def sizes(self) -> array:
        return self.cells[:: self.width]

    def take(self, other: Table, column: int, source: int) -> None:
        """Take over another table's column."""
        for i in (0, 1):
            self.cells[column + i :: self.width] = other.cells[source + i :: other.width]

    def place(self, outs: Sequence[Tensor], dtype: torch.dtype | None) -> None:
        """Let results go to `outs`, which are contiguous: of one `dtype`, or by default each of its first model's."""
        codes = self.cells[self.MODELS + 1 :: self.width] if dtype is None else array("q", [_DTYPE[dtype]]) * len(outs)
        self.cells[self.RESULT :: self.width] = array("q", map(Tensor.data_ptr, outs))
        self.cells[self.RESULT + 1 :: self.width] = codes

    def in_order(self, order: Sequence[int]) -> Table:
        """The rows in this order."""
        cells = array("q")
        for i in order:
            cells += self.cells[i * self.width : (i + 1) * self.width]
        return Table(cells, self.models)

    def distinct(self, column: int) -> bool:
        """Whether no two tensors of a column begin at one address."""
        return _core.distinct(self.cells, self.models, column)

    def apart(self, column: int, others: Sequence[int]) -> bool:
        """Whether a column's tensors share no memory with each other and none with the other columns'."""
        return _core.apart(self.cells, self.models, column, others)

    def merge(self, names: Sequence[str], spec: MergeSpec, *, together: bool) -> list[int]:
        """:func:`merge_many` of the rows, which have these names."""
        sizes, counts, threads = self.sizes, array("q"), torch.get_num_threads()
        if spec.sparsify == "bernoulli":
            self.cells[1 :: self.width] = array("q", map(tensor_id, names))
        if spec.sparsify in ("magnitude", "band") and not (together and spec.trims):
            of_size = {n: [count for end in spec.counts(n) for count in end] for n in set(sizes)}
            for n in sizes:
                counts.extend(of_size[n])
        options = _options(spec, 0, "", None, None)
        if together and spec.trims:
            options["selection"] = _core.select_many(self.cells, spec.counts(sum(sizes))[0], options["tie_all"], threads)
        if together and options["majority"]:
            positive = _core.vote_balance_many(self.cells, self.models, counts, options, threads) > 0
            options |= {"majority": False, "zero_vote": _ZERO_VOTE["positive" if positive else "negative"]}
        return _core.merge_many(self.cells, self.models, counts, options, threads)

    def lerp(self, alpha: float) -> list[int]:
        """:func:`lerp_many` from each base to its one model."""
        near_a = alpha < 0.5
        return _core.lerp_many(self.cells, near_a, alpha if near_a else 1.0 - alpha, torch.get_num_threads())

    def non_finite(self, column: int) -> list[int]:
        """Which of a column's tensors have a NaN or an infinity."""
        return _core.find_non_finite(self.cells, self.models, column, torch.get_num_threads())


def _reader() -> Any:
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.10
    return None if api is None else _reader_by(api)


@cache
def _reader_by(api: Any) -> Any:
    return _core.reader(api, list(PLAIN), Tensor.is_neg)


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
    return Table(array("q", flat), len(spec.weights)).merge([row.name for row in rows], spec, together=together)


def lerp_many(pairs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float) -> list[int]:
    """:func:`pymerge.native.lerp` of each (a, b, out); returns which have a difference that is NaN or infinite."""
    flat: list[int] = []
    for a, b, out in pairs:
        flat += (out.numel(), 0, out.data_ptr(), _DTYPE[out.dtype], a.data_ptr(), _DTYPE[a.dtype], b.data_ptr(), _DTYPE[b.dtype])
    return Table(array("q", flat), 1).lerp(alpha)


def non_finite(tensors: Sequence[Tensor]) -> list[int]:
    """Which of the tensors have a NaN or an infinity."""
    flat: list[int] = []
    for t in tensors:
        flat += (t.numel(), 0, t.data_ptr(), _DTYPE[t.dtype], 0, 0)
    return Table(array("q", flat), 0).non_finite(Table.RESULT)
