"""One tensor of several models as flat vectors, worked on a piece at a time: what the methods outside the fused operation share.

Memory beyond inputs and result is a few pieces per model. Sums are taken by :func:`pymerge.ops.dots` piece after piece, or within rows by
folding halves, so they depend on element indices alone: not on threads, nor on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import fresh, ops
from ..finite import raise_if_not_finite
from ..reference import compute_dtype, round_to

__all__ = ["Flat", "check_inputs", "choose", "row_sums"]

PIECE = 1 << 20


def check_inputs(base: Tensor | None, models: Sequence[Tensor], name: str) -> None:
    """Raise NonFiniteError for a NaN or an infinity in an input."""
    raise_if_not_finite([("base", base), *((f"model {i}", x) for i, x in enumerate(models))], name)


class Flat:
    """Base and models of one tensor.

    Args:
        base: a tensor, or None for a base of zeros.
        models: tensors of its shape.

    Attributes:
        compute: the dtype of the arithmetic: fp64 when an input is fp64, else fp32.
        n: number of elements.
        columns: elements of a row, the last dimension; a tensor of one or no dimension is one row.
    """

    def __init__(self, base: Tensor | None, models: Sequence[Tensor]) -> None:
        given = [*models, *([] if base is None else [base])]
        self.compute = compute_dtype(given)
        self.shape, self.device, self.n = models[0].shape, models[0].device, models[0].numel()
        self.columns = max(1, self.shape[-1] if self.shape else 1)
        self._base = None if base is None else base.detach().reshape(-1)
        self._models = [x.detach().reshape(-1) for x in models]

    def pieces(self, unit: int = 1) -> Iterator[slice]:
        """The elements in order, in slices of about PIECE elements that hold whole units."""
        size = max(1, PIECE // unit) * unit
        for begin in range(0, self.n, size):
            yield slice(begin, min(begin + size, self.n))

    def base(self, at: slice) -> Tensor:
        """The base there, in the dtype of the arithmetic."""
        return torch.zeros((), dtype=self.compute, device=self.device) if self._base is None else self._base[at].to(self.compute)

    def models(self, at: slice) -> list[Tensor]:
        """The models there, in the dtype of the arithmetic."""
        return [x[at].to(self.compute) for x in self._models]

    def deltas(self, at: slice) -> list[Tensor]:
        """The models less the base there."""
        models = self.models(at)
        if self._base is None:
            return models
        base = self.base(at)
        return [x - base for x in models]

    def scalar(self, value: float) -> Tensor:
        """`value`, rounded once to the dtype of the arithmetic."""
        return torch.tensor(value, dtype=torch.float64).to(self.compute).to(self.device)

    def write(self, result: Callable[[slice], Tensor], dtype: torch.dtype, out: Tensor | None, unit: int = 1) -> Tensor:
        """The tensor whose elements `at` are ``result(at)``, rounded once to `dtype`; in `out` where that is given."""
        to = fresh.empty(self.shape, dtype, self.device) if out is None or not out.is_contiguous() else out.detach()
        flat = to.view(-1)
        for at in self.pieces(unit):
            flat[at] = round_to(result(at), dtype)
        if out is None:
            return to
        return out if out.is_contiguous() else out.copy_(to)

    def gram(self) -> list[list[float]]:
        """Dot products of the deltas with each other, in fp64: [models, models]."""
        count = len(self._models)
        sums = [[0.0] * count for _ in range(count)]
        for at in self.pieces():
            deltas = self.deltas(at)
            for i in range(count):
                for j in range(i, count):
                    sums[i][j] += float(ops.dots(deltas[i], deltas[j])[2])
        return [[sums[min(i, j)][max(i, j)] for j in range(count)] for i in range(count)]

    def row_gram(self) -> Tensor:
        """The same for each row: fp64 [models, models, rows], on the CPU."""
        count = len(self._models)
        columns: list[Tensor] = []
        for at in self.pieces(self.columns):
            rows = [d.view(-1, self.columns).double() for d in self.deltas(at)]
            products = [[row_sums(rows[i] * rows[j]) if i <= j else None for j in range(count)] for i in range(count)]
            columns.append(torch.stack([torch.stack([products[min(i, j)][max(i, j)] for j in range(count)]) for i in range(count)]).cpu())
        return torch.cat(columns, dim=-1) if columns else torch.zeros((count, count, 0), dtype=torch.float64)

    def combine_rows(self, coefficients: Sequence[Tensor], dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """base + sum_i(coefficients[i] * delta_i), a coefficient per row: fp64 [rows] each."""
        factors = [c.to(self.compute).to(self.device).unsqueeze(-1) for c in coefficients]

        def rows(at: slice) -> Tensor:
            total = torch.zeros((), dtype=self.compute, device=self.device)
            of = slice(at.start // self.columns, at.stop // self.columns)
            for delta, factor in zip(self.deltas(at), factors, strict=True):
                total = total + delta.view(-1, self.columns) * factor[of]
            return self.base(at) + total.view(-1)

        return self.write(rows, dtype, out, self.columns)


def row_sums(x: Tensor) -> Tensor:
    """[rows, columns] to [rows]: halves are folded onto each other, column j + ceil(columns / 2) onto column j, until one is left."""
    while x.shape[1] > 1:
        half = (x.shape[1] + 1) // 2
        rest = x.shape[1] - half
        x = torch.cat([x[:, :rest] + x[:, half:], x[:, rest:half]], dim=1)
    return x[:, 0]


def choose(condition: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    """``torch.where(condition, x, y)``, y being +0 where it is not given, by masks of bits.

    torch's own branches on every element of a CPU tensor, which takes fifteen times as long where neighbours differ.
    """
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    mask, bits = -condition.to(integer), x.view(integer)
    if y is None:
        return (bits & mask).view(x.dtype)
    other = y.view(integer)
    return (((bits ^ other) & mask) ^ other).view(x.dtype)
