"""Models whose tensors are all plain, which the C++ core reads by itself: asking tensors for their attributes in Python costs more than
merging small ones.

Plain are tensors of torch's own classes, contiguous, in CPU memory, of dtypes that are computed with, not negated lazily, of the same names
and shapes in all models, and not tied. What is not plain, and all that is wrong, is the business of :mod:`pymerge.tree` and
:mod:`pymerge.many_ops`, which merge plain tensors to the same bits. Reading takes torch's DLPack functions (since torch 2.10).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import fresh, ops
from .finite import raise_if_not_finite
from .spec import MergeSpec

__all__ = ["Plain"]


class Plain:
    """Models of plain tensors; results go where :meth:`place` puts them, or into the base.

    Attributes:
        names: of the tensors, in the first model's order.
        base, models: lists of tensors, in the names' order.
        of_one_arithmetic: no tensor is fp64, or in each row one is.
    """

    def __init__(self, names: Sequence[str], base: list[Tensor] | None, models: list[list[Tensor]], table: Any, same_dtypes: bool) -> None:
        self.names, self.base, self.models, self._table, self._same_dtypes = names, base, models, table, same_dtypes

    @classmethod
    def of(cls, base: Any, models: Sequence[Any]) -> Plain | None:
        """The models, if that is what they are."""
        given = models if base is None else [base, *models]
        native = None if torch.compiler.is_compiling() else _native()
        if native is None or any(type(m) not in (dict, OrderedDict) for m in given) or not given[0]:
            return None
        if any(m.keys() != given[0].keys() for m in given):
            return None
        names = list(given[0])
        columns = [list(map(m.__getitem__, names)) for m in given]
        at = native.Table.MODELS if base is None else native.Table.BASE
        read = native.Table.read({at + 2 * i: column for i, column in enumerate(columns)}, len(models))
        if read is None or not read[0].distinct(at):
            return None
        return cls(names, None if base is None else columns.pop(0), columns, *read)

    @property
    def of_one_arithmetic(self) -> bool:
        wide = [torch.float64 in {t.dtype for t in row} for row in zip(*self._inputs)]
        return all(wide) or not any(wide)

    @property
    def _inputs(self) -> list[list[Tensor]]:
        return self.models if self.base is None else [self.base, *self.models]

    def place(self, dtype: torch.dtype | None, out: Mapping[str, Tensor] | None) -> list[Tensor] | None:
        """New tensors for the results, or `out`'s; None where those are not plain, not of the `dtype`, or share memory."""
        like, table = self.models[0], self._table
        if out is not None:
            return self._place_in(out, dtype)
        if dtype is None and self._same_dtypes:
            outs = list(map(torch.empty_like, like))
        elif dtype in ops.COMPUTED:
            outs = list(map(partial(torch.empty_like, dtype=dtype, memory_format=torch.contiguous_format), like))
        else:
            return None
        if max(table.sizes) >= fresh.LARGE // 8:
            for t in outs:
                fresh.in_large_pages(t)
        table.place(outs, dtype)
        return outs

    def _place_in(self, out: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[Tensor] | None:
        table = self._table
        if type(out) not in (dict, OrderedDict) or out.keys() != set(self.names):
            return None
        outs = list(map(out.__getitem__, self.names))
        read = table.read({table.MODELS: self.models[0], table.RESULT: outs}, 1)
        if read is None or dtype not in (None, *{t.dtype for t in outs}) or (dtype and len({t.dtype for t in outs}) > 1):
            return None
        table.take(read[0], table.RESULT, table.RESULT)
        return outs if self._apart(table.RESULT) else None

    def _apart(self, column: int) -> bool:
        inputs = range(self._table.MODELS if self.base is None else self._table.BASE, self._table.width, 2)
        return self._table.apart(column, [c for c in inputs if c != column])

    def place_in_base(self) -> bool:
        """Whether the base's tensors share no memory with each other and the models': then results go there."""
        self._table.take(self._table, self._table.RESULT, self._table.BASE)
        return self._apart(self._table.BASE)

    def merge(self, spec: MergeSpec, *, check_finite: bool, together: bool) -> None:
        """:func:`pymerge.many_ops.merge_many`; `together`: ranks and tied elections are over all tensors, :attr:`of_one_arithmetic`."""
        names, table, order = self.names, self._table, range(len(self.names))
        if together:
            order = sorted(order, key=self.names.__getitem__)
            names, table = [self.names[i] for i in order], table.in_order(order)
        found = table.merge(names, spec, together=together)
        labels = [*([] if self.base is None else ["base"]), *(f"model {m}" for m in range(len(self.models)))]
        for i in found if check_finite else ():
            raise_if_not_finite(zip(labels, (column[order[i]] for column in self._inputs)), names[i])

    def lerp(self, alpha: float, *, labels: tuple[str, str], check_finite: bool) -> None:
        """:func:`pymerge.many_ops.lerp_many`."""
        found = self._table.lerp(alpha)
        for i in found if check_finite else ():
            raise_if_not_finite(zip(labels, (self.base[i], self.models[0][i])), self.names[i])

    def require_finite(self, label: str) -> None:
        """:func:`pymerge.many_ops.require_finite` of the one model, in the order of names."""
        for name, i in sorted((self.names[i], i) for i in self._table.non_finite(self._table.MODELS)):
            raise_if_not_finite([(label, self.models[0][i])], name)


def _native() -> Any:
    """The C++ core on lists, if it is what merges tensors in CPU memory now, and nobody watches or transforms torch's functions."""
    if not ops.unwatched(()) or _function_modes() or ops.forced_backend() not in (None, "native"):
        return None
    try:
        from . import native_many
    except ImportError:  # which is raised when there is something to merge
        return None
    return native_many


_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
