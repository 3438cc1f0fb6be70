"""What one read of a tensor, or of many tensors pooled, tells about base and models: plain numbers with the names of the field."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diagnose_ops import count_counts, count_sums

__all__ = ["Statistics", "pool"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums and counts of :func:`pymerge.reference_diagnose.diagnose` for one tensor, or for several together.

    Attributes:
        models: how many.
        numel: elements.
        sums, counts: see there.
    """

    models: int
    numel: int
    sums: Tensor
    counts: Tensor

    def add(self, part: Statistics) -> None:
        """Add those of a part of the same tensor, in place; `numel` is that of the whole already."""
        top = slice(2 * self.models, 3 * self.models)
        largest = torch.maximum(self.counts[top], part.counts[top])  # keys of one compute dtype
        self.sums.add_(part.sums)
        self.counts.add_(part.counts)
        self.counts[top] = largest

    def product(self, a: int, b: int) -> float:
        """A dot product: 0 is the base, i + 1 the delta of model i."""
        a, b = min(a, b), max(a, b)
        return self.sums[a * (self.models + 1) - a * (a - 1) // 2 + b - a].item()

    @property
    def base_norm(self) -> float:
        """||base||."""
        return math.sqrt(self.product(0, 0))

    def norm(self, i: int) -> float:
        """||delta_i||."""
        return math.sqrt(self.product(i + 1, i + 1))

    def relative(self, i: int) -> float:
        """||delta_i|| / ||base||; infinite for a changed base of zeros, 0 where nothing changed."""
        return _ratio(self.norm(i), self.base_norm)

    def largest(self, i: int) -> float:
        """max |delta_i|."""
        key = self.counts[2 * self.models + i]
        return (key.view(torch.float64) if key >= 2**31 else key.to(torch.int32).view(torch.float32)).item()

    def l1(self, i: int) -> float:
        """Sum of |delta_i|."""
        return self.sums[(self.models + 1) * (self.models + 2) // 2 + i].item()

    def changed(self, i: int) -> int:
        """Elements where model i is not the base."""
        return int(self.counts[i])

    def kept(self, i: int) -> int:
        """Elements of delta_i that the trimming keeps."""
        return int(self.counts[self.models + i])

    def cosine(self, i: int, j: int) -> float:
        """Between delta_i and delta_j; NaN where one is zero."""
        return _ratio(self.product(i + 1, j + 1), self.norm(i) * self.norm(j), zero=math.nan)

    def weight_cosine(self, i: int, j: int | None = None) -> float:
        """Between the weights themselves of models i and j, or of model i and the base; NaN where one is zero."""
        dot = self.product(0, 0) + self.product(0, i + 1) + (0.0 if j is None else self.product(0, j + 1) + self.product(i + 1, j + 1))
        norm = self.base_norm if j is None else self.weight_norm(j)
        return _ratio(dot, self.weight_norm(i) * norm, zero=math.nan)

    def weight_norm(self, i: int) -> float:
        """||model i||."""
        return math.sqrt(max(self.product(0, 0) + 2 * self.product(0, i + 1) + self.product(i + 1, i + 1), 0.0))

    @property
    def agreement_mass(self) -> float:
        """Sum |sum_i delta_i| / sum sum_i |delta_i|: 1 where nothing cancels; NaN where nothing changed."""
        return _ratio(self.sums[-1].item(), sum(self.l1(i) for i in range(self.models)), zero=math.nan)

    @property
    def sum_ratio(self) -> float:
        """||sum of deltas|| / sqrt(sum of ||delta||^2): 1 where they are orthogonal; NaN where nothing changed."""
        pairs = [(a, b) for a in range(1, self.models + 1) for b in range(1, self.models + 1)]
        square = sum(self.product(a, a) for a in range(1, self.models + 1))
        return _ratio(math.sqrt(max(sum(self.product(a, b) for a, b in pairs), 0.0)), math.sqrt(square), zero=math.nan)

    def kept_by(self, k: int) -> int:
        """Elements that at least k >= 2 models keep."""
        return int(self.counts[3 * self.models + k - 2]) if k <= self.models else 0

    @property
    def sign_conflict(self) -> float:
        """Of the elements that two models or more keep, the share where their signs are not all equal; NaN where there are none."""
        return _ratio(int(self.counts[4 * self.models - 1]), self.kept_by(2), zero=math.nan)

    @property
    def expected_conflict(self) -> float:
        """What :attr:`sign_conflict` would be if every kept sign were a fair coin: the mean of 1 - 2^(1 - k) over the same elements, k
        being the number of models that keep each."""
        expected = sum((self.kept_by(k) - self.kept_by(k + 1)) * (1 - 2.0 ** (1 - k)) for k in range(2, self.models + 1))
        return _ratio(expected, self.kept_by(2), zero=math.nan)

    def _pair(self, i: int, j: int) -> int:
        i, j = min(i, j), max(i, j)
        return 4 * self.models + i * (self.models - 1) - i * (i - 1) // 2 + j - i - 1

    def both_kept(self, i: int, j: int) -> int:
        """Elements that models i and j both keep."""
        return int(self.counts[self._pair(i, j)])

    def pair_conflict(self, i: int, j: int) -> float:
        """Of those, the share with opposite signs."""
        pairs = self.models * (self.models - 1) // 2
        return _ratio(int(self.counts[self._pair(i, j) + pairs]), self.both_kept(i, j), zero=math.nan)

    def jaccard(self, i: int, j: int) -> float:
        """Overlap of what models i and j keep: intersection by union."""
        both = self.both_kept(i, j)
        return _ratio(both, self.kept(i) + self.kept(j) - both, zero=math.nan)


def _ratio(a: float, b: float, zero: float | None = None) -> float:
    if b:
        return a / b
    return zero if zero is not None else (math.inf if a else 0.0)


def pool(parts: Iterable[Statistics], models: int) -> Statistics:
    """The statistics of several tensors as one vector, added in order."""
    sums, counts, numel = torch.zeros(count_sums(models), dtype=torch.float64), torch.zeros(count_counts(models), dtype=torch.int64), 0
    top = slice(2 * models, 3 * models)
    for part in parts:
        largest = torch.maximum(_as_doubles(counts[top]), _as_doubles(part.counts[top]))
        sums, counts, numel = sums + part.sums, counts + part.counts, numel + part.numel
        counts[top] = largest.view(torch.int64)
    return Statistics(models, numel, sums, counts)


def _as_doubles(keys: Tensor) -> Tensor:
    """Keys of fp32 (below 2^31) or fp64 magnitudes as fp64 numbers, so that tensors of both kinds can be pooled."""
    return torch.where(keys >= 2**31, keys.view(torch.float64), keys.to(torch.int32).view(torch.float32).double())
