"""Merging tensors that pass by in slices: what a method must know of all of a tensor, or of the model, is gathered in passes before.

The engine calls, for each pass, :meth:`Sliced.begin`, :meth:`Sliced.add` for every slice (a tensor's in order) and :meth:`Sliced.end`; then
:meth:`Sliced.merge` for every slice. The result has the bytes that the method gives for whole tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import slice_ops
from ..spec import MergeSpec

__all__ = ["FusedSlices", "MakeSliced", "Read", "SlicedTensor", "Sliced", "fused_slices", "whole_model"]

Read = Callable[[str, Sequence[tuple[int, int]]], "tuple[Tensor | None, list[Tensor]]"]
"""``read(name, ranges)``: base and models, flat, of a tensor's elements [begin, end), one range after the other."""

STEP = 1 << 20
"""Elements of each model that are read at a time when a pass has to be repeated."""


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor to be merged in slices.

    Attributes:
        name, shape: its own.
        f64: it computes in fp64.
        parameters: keywords of the method.
        device: where its slices will be; the same for all tensors that pass by together.
    """

    name: str
    shape: tuple[int, ...]
    f64: bool
    parameters: Mapping[str, Any]
    device: torch.device = torch.device("cpu")

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Sliced:
    """Merges the slices of one tensor, or of all tensors of a model; a method without passes has to define :meth:`merge` alone.

    Args:
        tensors: all that will pass by.
        memory: bytes that may be taken for what is gathered.

    Attributes:
        tensors: by name.
        passes: how often everything has to pass by before it is merged.
    """

    passes = 0

    def __init__(self, tensors: Sequence[SlicedTensor], memory: int) -> None:
        self.tensors = {t.name: t for t in tensors}

    def begin(self, number: int, read: Read) -> None:
        """A pass begins. What is needed out of order can be read at once."""

    def add(self, number: int, name: str, first: int, base: Tensor | None, models: list[Tensor]) -> None:
        """A slice in a pass: flat tensors, the elements from `first` on of the tensor `name`."""
        raise NotImplementedError

    def end(self, number: int, read: Read) -> None:
        """A pass is over."""

    def merge(self, name: str, first: int, base: Tensor | None, models: list[Tensor], out: Tensor, check_finite: bool) -> None:
        """Merge a slice into `out`, a flat tensor of the result's dtype.

        Raises:
            NonFiniteError: an input has a NaN or an infinity and `check_finite` is set; the message says "base" or "model 0".
        """
        raise NotImplementedError


MakeSliced = Callable[[Sequence[SlicedTensor], int], Sliced]


class FusedSlices(Sliced):
    """The fused merge. One pass finds the thresholds, one the norms that rescaling restores, one who wins tied elections, where needed.

    The winner is nearly always found on the way to the thresholds: the votes are counted with guessed ones, and the few elements which
    those keep and the exact ones drop, or the other way round, can seldom turn the majority. Only if they could is there a pass for it.

    With several tensors ranks run over all of them, in the order of their names, and so does the majority: scope "model". Magnitudes of
    fp32 and fp64 compare only when both are fp64, so then one fp64 tensor makes all compute in it. Norms are each tensor's own.
    """

    def __init__(self, tensors: Sequence[SlicedTensor], specs: Mapping[str, MergeSpec], memory: int) -> None:
        super().__init__(sorted(tensors, key=lambda t: t.name), memory)
        self._specs = specs
        self._starts: list[int] = []
        total = 0
        for tensor in self.tensors.values():
            self._starts.append(total)
            total += tensor.size
        self._names = list(self.tensors)
        self._start = dict(zip(self._names, self._starts, strict=True))
        self._f64 = any(t.f64 for t in tensors)
        spec = next(iter(specs.values()))
        self._selections: list[slice_ops.StreamedSelection] = []
        self._rows: list[list[list[int]]] = []
        self._sums: dict[str, list[float]] = {}
        self._balance = 0
        if spec.sparsify in ("magnitude", "band"):
            counts = spec.counts(total)
            # Collected keys come in blocks, half of which may be unused.
            limit = memory // (2 * len(counts) * len(spec.weights) * (8 if self._f64 else 4))
            device, ties = tensors[0].device, spec.convention.tie_break
            self._selections = [slice_ops.StreamedSelection(total, c, ties, self._f64, limit, device) for c in counts]
        searches = any(s.searched for s in self._selections)
        self._rescales = spec.sparsify != "none" and spec.convention.rescale == "norm"
        majority = spec.elect and spec.convention.zero_vote == "majority"
        self._guesses = majority and searches and not self._rescales and spec.sparsify == "magnitude" and spec.convention.tie_break == "all"
        steps = ((searches, self._select), (self._rescales, self._add_sums), (majority and not self._guesses, self._add_votes))
        self._steps = [add for needed, add in steps if needed]
        if self._selections and not searches:
            self._take_rows()

    @property
    def passes(self) -> int:
        return len(self._steps)

    def begin(self, number: int, read: Read) -> None:
        if self._steps[number] != self._select:
            return
        for selection in self._selections:
            for name, ranges in self._by_tensor(selection.sample_ranges()):
                selection.sample(*self._widened(*read(name, ranges)))
        if self._guesses:
            self._rows = self._selections[0].guesses().tolist()

    def add(self, number: int, name: str, first: int, base: Tensor | None, models: list[Tensor]) -> None:
        self._steps[number](name, first, *self._widened(base, models))

    def end(self, number: int, read: Read) -> None:
        if self._steps[number] != self._select:
            return
        for selection in self._selections:
            while not selection.end_pass():
                for name, first, base, models in self._again(read):
                    selection.add(base, models, self._start[name] + first)
            for i, (begin, end) in enumerate(selection.lookups()):
                [(name, ranges)] = self._by_tensor([(begin, end)])
                selection.look(i, *self._widened(*read(name, ranges)), begin)
        turned = 2 * sum(self._selections[0].strayed())  # an election that turns from one side to the other counts for two
        self._take_rows()
        if self._guesses and turned and abs(self._balance) <= turned:
            self._balance = 0
            for part in self._again(read):
                self._add_votes(*part)

    def merge(self, name: str, first: int, base: Tensor | None, models: list[Tensor], out: Tensor, check_finite: bool) -> None:
        tensor = self.tensors[name]
        base, models = self._widened(base, models)
        slice_ops.merge(
            base, models, self._specs[name], out, name=name, first=first, shape=tensor.shape, selection=self._selection(name),
            factors=self._factors(name), balance=self._balance, check_finite=check_finite,
        )  # fmt: skip

    def _select(self, name, first, base, models) -> None:
        for selection in self._selections:
            selection.add(base, models, self._start[name] + first)
        if self._guesses:
            self._add_votes(name, first, base, models)

    def _again(self, read: Read) -> Iterator[tuple[str, int, Tensor | None, list[Tensor]]]:
        """Everything once more, outside the engine's passes."""
        for name, tensor in self.tensors.items():
            for first in range(0, tensor.size, STEP):
                yield name, first, *self._widened(*read(name, [(first, min(first + STEP, tensor.size))]))

    def _add_sums(self, name, first, base, models) -> None:
        sums = self._sums.get(name, [0.0] * (2 * len(models)))
        self._sums[name] = slice_ops.delta_sums(
            base, models, self._specs[name], sums, name=name, first=first, selection=self._selection(name)
        )

    def _add_votes(self, name, first, base, models) -> None:
        self._balance += slice_ops.vote_balance(
            base, models, self._specs[name], name=name, first=first, selection=self._selection(name), factors=self._factors(name)
        )

    def _take_rows(self) -> None:
        self._rows = [row for selection in self._selections for row in selection.rows().tolist()]
        self._selections = []  # and their memory

    def _selection(self, name: str) -> Tensor | None:
        """Cuts count from the first of all elements; in a tensor from its own: -1 keeps no equal one, size - 1 all."""
        if not self._rows:
            return None
        start, size = self._start[name], self.tensors[name].size
        rows = torch.tensor(self._rows, dtype=torch.int64)
        rows[:, 1] = (rows[:, 1] - start).clamp(-1, size - 1)
        return rows

    def _factors(self, name: str) -> list[float] | None:
        if not self._rescales:
            return None
        sums = self._sums.get(name, [0.0] * (2 * len(self._specs[name].weights)))
        return [full / kept if kept > 0 else 1.0 for full, kept in zip(sums[::2], sums[1::2], strict=True)]

    def _widened(self, base: Tensor | None, models: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """One fp64 tensor is enough for a merge to compute in fp64."""
        if not self._f64 or any(x.dtype == torch.float64 for x in (base, *models) if x is not None):
            return base, models
        return (None, [models[0].double(), *models[1:]]) if base is None else (base.double(), models)

    def _by_tensor(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[str, list[tuple[int, int]]]]:
        """Ranges of flat indices as (tensor, ranges in it)."""
        found: dict[str, list[tuple[int, int]]] = {}
        for begin, end in ranges:
            at = bisect_right(self._starts, begin) - 1
            while begin < end:
                name, start = self._names[at], self._starts[at]
                stop = min(end, start + self.tensors[name].size)
                if begin < stop:
                    found.setdefault(name, []).append((begin - start, stop - start))
                begin, at = max(begin, stop), at + 1
        return list(found.items())


def fused_slices(spec_of: Callable[..., MergeSpec]) -> MakeSliced:
    """The `sliced` of a method that is :func:`pymerge.ops.merge` with the spec ``spec_of(**parameters)``."""

    def make(tensors: Sequence[SlicedTensor], memory: int) -> Sliced:
        return FusedSlices(tensors, {t.name: spec_of(**t.parameters) for t in tensors}, memory)

    return make


def whole_model(spec_of: Callable[..., MergeSpec]) -> Callable[..., Hashable | None]:
    """The `whole_model` of such a method: densities and details have to be the same for all tensors, weights and scale need not."""

    def key(**parameters) -> Hashable | None:
        spec = spec_of(**parameters)
        return (spec.densities, spec.convention) if spec.convention.scope == "model" else None

    return key
