"""Averages, interpolations and task vectors, from their formulas, in the precision of their arguments."""

import numpy as np


def linear(models, weights, normalize=True):
    total = sum(x * x.dtype.type(w) for x, w in zip(models, weights))
    return total / np.sum(np.asarray(weights, models[0].dtype)) if normalize else total


def task_arithmetic(base, models, scales):
    return base + sum((x - base) * base.dtype.type(s) for x, s in zip(models, scales))


def wise_ft(base, finetuned, alpha):
    return (1 - alpha) * base + alpha * finetuned


def slerp(a, b, t):
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosine = (a / (np.linalg.norm(a) or 1.0) * (b / (np.linalg.norm(b) or 1.0))).sum()
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)
