"""mergekit's task-arithmetic family on one tensor: weights before the vote, sum of weights as divisor, a tied vote is positive."""

import numpy as np


def exact_k(delta, density):
    if density >= 1:
        return np.ones(delta.shape, bool)
    k = 0 if density <= 0 else max(1, int(density * delta.size))
    keep = np.zeros(delta.shape, bool)
    keep[np.argsort(-np.abs(delta), kind="stable")[:k]] = True
    return keep


def ties(base, models, weights, density, scale):
    return merge(base, models, weights, scale, lambda i, d: exact_k(d, density), elect=True, normalize=True)


def merge(base, models, weights, scale, keep, *, elect, normalize, rescale=lambda delta, kept: 1.0):
    f = base.dtype.type
    total, weight, parts = np.zeros_like(base), np.zeros_like(base), []
    for i, (x, w) in enumerate(zip(models, weights)):
        delta = x - base
        kept = np.where(keep(i, delta), delta, f(0))
        parts.append(kept * f(rescale(delta, kept)) * f(w))
    sign = np.where(sum(parts, np.zeros_like(base)) >= 0, f(1), f(-1))
    for p, w in zip(parts, weights):
        agrees = np.sign(p) == sign if elect else np.ones(p.shape, bool)
        total, weight = total + np.where(agrees, p, f(0)), weight + np.where(agrees, f(w), f(0))
    if normalize:
        total = total / np.where(weight == 0, f(1), weight)
    return base + total * f(scale)
