"""mergekit's own merge function on the same tensors, in their dtype as its recipes have it (bf16 arithmetic for bf16 tensors)."""

from __future__ import annotations

import functools
from importlib.metadata import version

from mergekit.merge_methods import merge_tensors

from ..inputs import Inputs
from ..methods import ALPHA, SCALE
from . import Rival
from .naive import each

__all__ = ["rivals"]

METHODS = ("linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties")


def _merge(method: str, density: float, base, models, average):
    given = models if method == "linear" else [base, *models]
    first = len(given) - len(models)
    parameters: dict = {"weight": {i: 1.0 for i in range(first, len(given))}}
    if method == "task_arithmetic":
        parameters["weight"] = {i: SCALE for i in range(first, len(given))}
    if method in ("ties", "dare_linear", "dare_ties"):
        parameters["density"] = {i: density for i in range(first, len(given))}
    if method == "slerp":
        parameters = {"t": ALPHA}
    return merge_tensors(given, method, ids=list(range(len(given))), parameters=parameters, base_index=None if method == "linear" else 0)


def rivals(method: str, inputs: Inputs, density: float) -> list[Rival]:
    if method not in METHODS:
        return []
    # argsort's int64 indices and its fp32 copy, and the stacked masks and products; a quarter more than was measured
    need = (22 if method == "ties" else 42 if method == "slerp" else 18) * len(inputs.models)
    # Its deltas and sums are rounded to bf16, and its argsort takes any of the elements at the k-th magnitude.
    least = 0.9 if method in ("ties", "slerp") else 0.99
    run = functools.partial(_merge, method, density)
    return [Rival(f"mergekit {version('mergekit')}", lambda: each(inputs, run), need, random=method.startswith("dare"), least=least)]
