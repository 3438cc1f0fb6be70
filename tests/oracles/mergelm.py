"""MergeLM's TIES: as the paper's, but masks int(n * (1 - density)) and keeps what is at least the largest of them."""

from . import ties_paper


def ties(base, models, weights, density, scale):
    return ties_paper.ties(base, models, weights, density, scale, k=max(int(base.size * (1 - density)), 1))
