"""Merges that look at each element's deltas, from their definitions, on flat arrays."""

import numpy as np

from .philox import keep_draws


def band(delta, density, gamma):
    """Whether elements are kept: the largest left out, then the largest of the rest; a stable sort, so that lower indices rank higher."""
    n = delta.size
    order = np.argsort(-np.abs(delta), kind="stable")
    if density >= 1:
        return np.ones(n, bool)
    wanted, outliers = int(density * n), int(gamma * n)
    start = min(outliers, n - wanted)
    keep = np.zeros(n, bool)
    keep[order[start : start + wanted]] = True
    return keep


def magmax(base, models, scale=1.0):
    deltas = np.stack(models) - base
    return base + scale * np.take_along_axis(deltas, np.abs(deltas).argmax(0)[None], 0)[0]


def nearswap(base, model, t):
    distance = np.abs(model - base)
    w = np.where(distance <= t, 1.0, t / np.where(distance == 0, 1, distance))
    return w * model + (1 - w) * base


def arcee_fusion(base, model):
    """On matrices."""

    def softmax(x):
        power = np.exp(x - x.max(-1, keepdims=True))
        return power / power.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(model), softmax(base)
    importance = np.abs(model - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ranked = np.sort(importance, axis=None)
    q1, q2, q3 = (ranked[int(np.floor(q * (ranked.size - 1)))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= q2 + 1.5 * (q3 - q1), model, base)


def ram(base, models, epsilon=1e-5, factors=None):
    deltas = np.stack(models) - base
    changed = np.abs(deltas) > epsilon
    count = changed.sum(0)
    if factors is not None:
        deltas = np.where(count == 1, deltas * np.asarray(factors)[:, None], deltas)
    return base + np.where(changed, deltas, 0).sum(0) / np.maximum(count, 1)


def ramplus_tl(base, models, epsilon=1e-5, r=0.1, alpha=0.2):
    changed = np.abs(np.stack(models) - base) > epsilon
    count = changed.sum(0)
    unique, shared = (changed & (count == 1)).sum(1), (changed & (count > 1)).sum(1)
    return ram(base, models, epsilon, 1 + r * np.minimum(shared / np.maximum(unique, 1), alpha))


def sce(base, models, select_topk=1.0):
    deltas = np.stack(models) - base
    if select_topk < 1:
        variance = deltas.var(0)
        best = np.argsort(-variance, kind="stable")[: int(np.count_nonzero(variance) * select_topk)]
        mask = np.zeros(base.size, bool)
        mask[best] = True
        deltas = np.where(mask, deltas, 0)
    energy = (deltas**2).sum(1)
    weights = (energy / (energy.sum() or 1.0))[:, None]
    agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    divisor = np.where(agree, weights, 0).sum(0)
    return base + np.where(agree, deltas * weights, 0).sum(0) / np.where(divisor == 0, 1, divisor)


def della_keep(delta, density, epsilon, seed, name, model):
    """Keep mask and probabilities of a matrix: ranks within rows."""
    columns = delta.shape[1]
    rank = np.empty(delta.shape, int)
    for row, values in zip(rank, delta):
        row[np.argsort(-np.abs(values), kind="stable")] = np.arange(columns)[::-1]
    chance = density - epsilon + 2 * epsilon * (rank / (columns - 1) if columns > 1 else 0.5 + rank)
    if not 0 < density < 1:
        chance = np.full(delta.shape, float(density))
    draws = keep_draws(delta.size, seed, name, model).reshape(delta.shape)
    return draws < np.round(chance * 2**32), chance
