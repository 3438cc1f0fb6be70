"""PEFT's merge_utils on one tensor: exactly int(density * n) kept, unweighted vote, weights after it, count as divisor."""

import numpy as np


def ties(base, models, weights, density, scale):
    def prune(tau):
        kept = np.zeros_like(tau)
        best = np.argsort(-np.abs(tau), kind="stable")[: int(density * tau.size)]
        kept[best] = tau[best]
        return kept

    return combine(base, [prune(x - base) for x in models], weights, scale)


def combine(base, taus, weights, scale):
    taus = np.stack(taus)
    majority = np.where(taus.sum(0) >= 0, 1, -1)
    agree = np.sign(taus) == majority
    total = (taus * np.asarray(weights, base.dtype)[:, None] * agree).sum(0)
    return base + base.dtype.type(scale) * (total / np.maximum(agree.sum(0), 1).astype(base.dtype))
