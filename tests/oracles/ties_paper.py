"""TIES as the paper's algorithm 1 and the authors' repository have it: one vector per model, kthvalue, majority sign for ties."""

import numpy as np


def ties(base, models, weights, density, scale, k=None, divide=True):
    taus = np.stack(models) - base
    n = base.size
    if density < 1:
        k = n - int(density * n) if k is None else k  # kthvalue counts from 1, from the smallest
        threshold = np.sort(np.abs(taus), axis=1)[:, k - 1 : k]
        taus = np.where(np.abs(taus) >= threshold, taus, 0)
    sign = np.sign(taus.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = np.where(sign > 0, taus > 0, taus < 0)
    total = np.where(agree, taus * np.asarray(weights, base.dtype)[:, None], 0).sum(0)
    return base + base.dtype.type(scale) * (total / np.maximum(agree.sum(0), 1).astype(base.dtype) if divide else total)
