"""fusion_bench's TIES: as the paper's, but what agrees is summed, not averaged."""

from . import ties_paper


def ties(base, models, weights, density, scale):
    return ties_paper.ties(base, models, weights, density, scale, divide=False)
