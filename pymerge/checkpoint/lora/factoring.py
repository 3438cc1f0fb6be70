"""From a matrix, or a product of thin factors, to the nearest matrix of a lower rank: truncated singular value decompositions.

In fp64 on one thread, with fixed signs: the same bits for the same input on the same machine and torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["factor_matrix", "factor_product", "one_thread"]

OVERSAMPLING = 16
"""Directions followed beyond those wanted: the gap in the spectrum that decides the speed of convergence is behind these."""

MOST_ITERATIONS = 60


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK's sums are split by the number of threads, so its last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def factor_product(b: Tensor, a: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """The best approximation of ``b @ a`` of a rank, without forming the product: QR of both, then a small SVD.

    Args:
        b: (out, R); a: (R, in).
        rank: at most; None for as many as there are.
        energy: smallest rank that keeps this fraction of the squared Frobenius norm; None for no such limit.

    Returns:
        B (out, r) and A (r, in) in fp64 with the singular values shared equally, and the fraction of the squared norm that they keep.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return _truncate(q_b @ u, s, vh @ q_a.t(), rank, energy, float(s.square().sum()))


def factor_matrix(matrix: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """The best approximation of a matrix of a rank; arguments and result as :func:`factor_product`.

    When few of many singular values are wanted they are found by block power iteration from a fixed start (Halko, Martinsson and Tropp
    2011, arXiv:0909.4061, section 4.5) until what is kept of the norm no longer grows.
    """
    m = matrix.double()
    if energy is not None or rank is None or 4 * (rank + OVERSAMPLING) >= min(m.shape):
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        return _truncate(u, s, vh, rank, energy, float(s.square().sum()))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(m.shape[1], rank + OVERSAMPLING, dtype=torch.float64, generator=generator)
    kept = -1.0
    for _ in range(MOST_ITERATIONS):
        left = torch.linalg.qr(m @ q).Q
        u, s, vh = torch.linalg.svd(left.t() @ m, full_matrices=False)
        before, kept = kept, float(s[:rank].square().sum())
        if kept - before <= 1e-10 * kept:
            break
        q = vh.t()
    return _truncate(left @ u, s, vh, rank, None, float(m.square().sum()))


def _truncate(u: Tensor, s: Tensor, vh: Tensor, rank: int | None, energy: float | None, total: float) -> tuple[Tensor, Tensor, float]:
    squares = s.square()
    count = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        # The tolerance is for sums that miss "all of it" by a rounding error.
        enough = torch.cumsum(squares, 0) >= (energy - 1e-12) * total
        count = min(count, int(enough.to(torch.uint8).argmax()) + 1 if bool(enough.any()) else len(s))
    count = max(count, 1)
    u, s, vh = u[:, :count], s[:count], vh[:count]
    # Either sign of a pair of singular vectors is right. Chosen so that the largest element of u is positive, the first of equals.
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0)
    root = s.sqrt()
    kept = float(squares[:count].sum()) / total if total else 1.0
    return u * (signs * root), (signs * root)[:, None] * vh, min(kept, 1.0)
