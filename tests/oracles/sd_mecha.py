"""sd-mecha's ties_sum on one tensor: threshold kept with all its ties, vote by counting signs, a tied vote drops the element."""

import numpy as np


def ties(base, models, weights, density, scale):
    taus = np.stack(models) - base
    if density < 1:
        k = max(int((1 - density) * base.size), 1)
        taus = np.where(np.abs(taus) >= np.sort(np.abs(taus), axis=1)[:, k - 1 : k], taus, 0)
    signs = np.sign(taus)
    agree = (signs == np.sign(signs.sum(0))) & (signs != 0)
    total = np.where(agree, taus * np.asarray(weights, base.dtype)[:, None], 0).sum(0)
    return base + base.dtype.type(scale) * (total / np.maximum(agree.sum(0), 1).astype(base.dtype))
