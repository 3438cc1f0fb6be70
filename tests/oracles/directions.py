"""Averages of directions from their definitions, on whole vectors in fp64."""

import numpy as np


def unit(v):
    length = np.linalg.norm(v)
    return v / length if length else v * 0


def angle(u, v):
    """Accurate for small angles too (Kahan)."""
    return 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))


def nuslerp(a, b, t):
    if not a.any() or not b.any():
        theta = np.pi / 2
    else:
        theta = angle(unit(a), unit(b))
    if np.sin(theta) < 1e-6:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def multislerp(vectors, weights):
    """Project on the tangent space of the mean direction, average there, project back."""
    units, lengths = [unit(v) for v in vectors], [np.linalg.norm(v) for v in vectors]
    mean = unit(sum(w * u for w, u in zip(weights, units)))
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units))
    step = np.linalg.norm(tangent)
    point = mean * np.cos(step) + tangent * np.sinc(step / np.pi)
    return point * sum(w * n for w, n in zip(weights, lengths))


def log_map(at, u):
    theta = angle(at, u)
    across = u - (u @ at) * at
    return theta * unit(across)


def karcher(vectors, steps=200):
    units = [unit(v) for v in vectors]
    m = unit(sum(units))
    for _ in range(steps):
        step = sum(log_map(m, u) for u in units) / len(units)
        way = np.linalg.norm(step)
        m = unit(np.cos(way) * m + np.sin(way) * unit(step))
    return m * np.mean([np.linalg.norm(v) for v in vectors])


def model_stock(base, models):
    deltas, n = [x - base for x in models], len(models)
    cosine = np.mean([unit(deltas[i]) @ unit(deltas[j]) for i in range(n) for j in range(i)])
    t = n * cosine / (1 + (n - 1) * cosine)
    return t * np.mean(models, axis=0) + (1 - t) * base


def by_rows(function, *matrices, **arguments):
    return np.stack([function(*rows, **arguments) for rows in zip(*matrices)])
