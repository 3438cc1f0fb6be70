"""The oracle of the diagnostics' reduction: how the deltas of several models relate, in plain torch.

Sums are those of pieces of 2**18 elements, each by :func:`pymerge.reference.tree_sum`, added in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import _deltas, _keys, compute_dtype, kept_by_magnitude, tree_sum

__all__ = ["PIECE", "count_counts", "count_sums", "diagnose"]

PIECE = 2**18


def count_sums(models: int) -> int:
    """How many sums there are of so many models."""
    return (models + 1) * (models + 2) // 2 + models + 1


def count_counts(models: int) -> int:
    """How many counts there are of so many models."""
    return 4 * models + models * (models - 1)


def diagnose(base: Tensor | None, models: Sequence[Tensor], selection: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Add the statistics of one tensor to `sums` and `counts`.

    Args:
        base: flat tensor [n], or None for a base of zeros.
        models: flat tensors [n].
        selection: int64 [models, 2] as :func:`pymerge.reference.select` gives it: which deltas are kept. Zeros never are.
        sums: fp64 [count_sums(models)] on the CPU: the dot products of (base, delta 0, delta 1, ...) with each other, upper triangle by
            rows; each delta's L1 norm; the sum over elements of abs(sum of the deltas). Deltas are computed in fp32 (fp64 when any input
            is), products and the sum of deltas in fp64.
        counts: int64 [count_counts(models)] on the CPU: non-zero deltas of each model; kept ones; the key (bits) of the largest magnitude
            (the larger one stays); elements that at least k models keep, k = 2, 3, ...; elements kept with both signs; then for each pair
            (0, 1), (0, 2), ... elements that both keep; and for each pair those with opposite signs.
    """
    dtype, count, n = compute_dtype([*models, *([] if base is None else [base])]), len(models), models[0].numel()
    whole = _deltas(base, models, dtype)
    whole_kept = [kept_by_magnitude(d, *row) & (d != 0) for d, row in zip(whole, selection.tolist(), strict=True)]
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    for begin in range(0, n, PIECE):
        deltas = [d[begin : begin + PIECE] for d in whole]
        kept = [k[begin : begin + PIECE] for k in whole_kept]
        wide = [d.double() for d in deltas]
        vectors = [torch.zeros_like(wide[0]) if base is None else base[begin : begin + PIECE].double(), *wide]
        total = wide[0]
        for d in wide[1:]:
            total = total + d
        terms = [vectors[a] * vectors[b] for a in range(count + 1) for b in range(a, count + 1)]
        terms += [d.abs() for d in wide] + [total.abs()]
        sums += torch.tensor([tree_sum(t) for t in terms], dtype=torch.float64)

        positive = torch.stack([k & (d > 0) for k, d in zip(kept, deltas)])
        negative = torch.stack([k & (d < 0) for k, d in zip(kept, deltas)])
        both = [kept[a] & kept[b] for a, b in pairs]
        opposite = [m & (positive[a] != positive[b]) for m, (a, b) in zip(both, pairs)]
        keepers = torch.stack(kept).sum(0)
        together = [keepers >= k for k in range(2, count + 1)]
        masks = [*(d != 0 for d in deltas), *kept, *together, positive.any(0) & negative.any(0), *both, *opposite]
        found = [int(m.sum()) for m in masks]
        largest = [int(_keys(d).max()) for d in deltas]
        found[2 * count : 2 * count] = [max(key, old) - old for key, old in zip(largest, counts[2 * count : 3 * count].tolist())]
        counts += torch.tensor(found)
