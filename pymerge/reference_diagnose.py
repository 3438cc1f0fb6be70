"""The oracle of the diagnostics' reduction: how the deltas of several models relate, in plain torch.

Sums are added over the tree of :func:`pymerge.reference.tree_sum`: in an fp32 computation each block's lanes in fp32 where its numbers
allow that (:func:`block_sums`), everything else in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import SUM_BLOCK, SUM_LANES, _deltas, _keys, compute_dtype, kept_by_magnitude

__all__ = ["PIECE", "TAME", "block_sums", "count_counts", "count_sums", "diagnose"]

PIECE = 2**20
"""Elements of which sums are formed by themselves, and then added in order."""

TAME = (2.0**-40, 2.0**50)
"""Largest magnitudes between which products of fp32 numbers, and sums of :data:`SUM_BLOCK` of them, neither overflow nor underflow."""


def count_sums(models: int) -> int:
    """How many sums there are of so many models."""
    return (models + 1) * (models + 2) // 2 + models + 1


def count_counts(models: int) -> int:
    """How many counts there are of so many models."""
    return 4 * models + models * (models - 1)


def block_sums(base: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """fp64 [blocks, count_sums(models)]: the sums of each :data:`SUM_BLOCK` elements, in the order of :func:`diagnose`.

    A block's products and lanes, and the sum of its deltas, are computed in the tensors' dtype; the lanes are folded in fp64. A block of
    fp32 numbers is computed in fp64 where the largest magnitude in `base` or in a delta is neither 0 nor within :data:`TAME`.

    So a product of fp32 vectors differs from the exact one by at most 2**-17 times the product of their norms, and an L1 norm and the sum
    of absolute sums by at most 2**-17 times the sum of the L1 norms: at most 63 + 64 roundings of 2**-24 each. Usually it is a hundredth
    of that, because roundings cancel.

    Args:
        base: [n] in the compute dtype; zeros where there is none.
        deltas: [n] each, of the same dtype.
    """
    vectors = [torch.nn.functional.pad(x, (0, -len(x) % SUM_BLOCK)).reshape(-1, SUM_BLOCK // SUM_LANES, SUM_LANES) for x in (base, *deltas)]
    tame = torch.ones(len(vectors[0]), dtype=torch.bool)
    for x in vectors:
        top = x.abs().amax((1, 2))
        tame &= (top == 0) | ((top >= TAME[0]) & (top <= TAME[1]))

    def sums(vectors: list[Tensor]) -> Tensor:
        total = vectors[1]
        for d in vectors[2:]:
            total = total + d
        terms = [a * b for i, a in enumerate(vectors) for b in vectors[i:]] + [d.abs() for d in (*vectors[1:], total)]
        return torch.stack([_folded(t) for t in terms], 1)

    wide = sums([x.double() for x in vectors])
    return wide if base.dtype == torch.float64 else torch.where(tame[:, None], sums(vectors), wide)


def _folded(terms: Tensor) -> Tensor:
    """fp64 [blocks] of terms [blocks, rows, lanes]: rows added in order in the terms' dtype, lanes folded in halves in fp64."""
    lanes = torch.zeros_like(terms[:, 0])
    for row in terms.unbind(1):
        lanes = lanes + row
    lanes = lanes.double()
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def diagnose(base: Tensor | None, models: Sequence[Tensor], selection: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Add the statistics of one tensor to `sums` and `counts`.

    Args:
        base: flat tensor [n], or None for a base of zeros.
        models: flat tensors [n].
        selection: int64 [models, 2] as :func:`pymerge.reference.select` gives it: which deltas are kept. Zeros and NaNs never are.
        sums: fp64 [count_sums(models)] on the CPU: the dot products of (base, delta 0, delta 1, ...) with each other, upper triangle by
            rows; each delta's L1 norm; the sum over elements of abs(sum of the deltas). Deltas are computed in fp32 (fp64 when any input
            is), and added by :func:`block_sums`.
        counts: int64 [count_counts(models)] on the CPU: non-zero deltas of each model; kept ones; the key (bits) of the largest magnitude
            (the larger one stays); elements that at least k models keep, k = 2, 3, ...; elements kept with both signs; then for each pair
            (0, 1), (0, 2), ... elements that both keep; and for each pair those with opposite signs.
    """
    dtype, count, n = compute_dtype([*models, *([] if base is None else [base])]), len(models), models[0].numel()
    whole = _deltas(base, models, dtype)
    whole_kept = [kept_by_magnitude(d, *row) & ((d > 0) | (d < 0)) for d, row in zip(whole, selection.tolist(), strict=True)]
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    for begin in range(0, n, PIECE):
        deltas = [d[begin : begin + PIECE] for d in whole]
        kept = [k[begin : begin + PIECE] for k in whole_kept]
        piece = torch.zeros_like(sums)
        for block in block_sums(torch.zeros_like(deltas[0]) if base is None else base[begin : begin + PIECE].to(dtype), deltas):
            piece += block
        sums += piece

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
