"""Times a registered merge method beside a copy of the bytes that it must move, once its result has been found right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import merge_methods  # noqa: F401 - registers the built-in methods
from ..merge_methods.registry import REQUIRED, Method, get_method
from ..ops import backend
from .ceiling import Ceiling
from .memory import extra_bytes
from .rounds import Contender, Times, interleave, ratio
from .weights import Weights

__all__ = ["Timing", "WrongResult", "time_method"]

CHECKED = 2**20 + 17
"""Elements that are also merged by the reference: a few threads' chunks and an odd end; the reference is slow."""

_TYPICAL = {"weight": 1.0, "density": 0.2, "t": 0.5}
"""For parameters (by the recipe's name) that have no default, or one that leaves nothing to do."""


class WrongResult(RuntimeError):
    """A method's result is not the reference's, so its speed means nothing."""


@dataclass(frozen=True)
class Timing:
    """One method, timed.

    Attributes:
        method: its name.
        models: merged, besides the base if there is one.
        base: whether a base was read too.
        elements: of each tensor.
        dtype: of all tensors, "bfloat16".
        bytes: every input once and the output once.
        seconds: median of a merge.
        copy_seconds: median of the fastest parallel copy that moves as many bytes, timed in turn with the merge.
        to_copy: median and quartiles of their ratio, round by round.
        rounds: how many of each.
        extra_bytes: memory at the peak, beside inputs and output; None where the system does not tell.
    """

    method: str
    models: int
    base: bool
    elements: int
    dtype: str
    bytes: int
    seconds: float
    copy_seconds: float
    to_copy: tuple[float, float, float]
    rounds: int
    extra_bytes: int | None


def time_method(name: str, weights: Weights, budget: float = 1.0) -> Timing:
    """Time the method of that name on `weights`, with its parameters' defaults.

    Args:
        name: of a registered method.
        weights: up to as many models as the method takes; `weights.out` is overwritten.
        budget: seconds to spend, roughly; at least three rounds.

    Raises:
        WrongResult: the first :data:`CHECKED` elements, as a tensor of their own, are not the reference's bit for bit.
        ValueError: the method has a parameter that no value is known for.
    """
    method = get_method(name)
    models = weights.models[: method.max_models]
    base = weights.base if method.base == "required" else None
    parameters = _parameters(method, len(models))

    def run(base, models: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        got = method.tensor(base, list(models), name=name, dtype=out.dtype, out=out, check_finite=True, **parameters)
        return out if got is out else out.copy_(got)

    part = slice(CHECKED)
    ours, expected = torch.full_like(weights.out[part], torch.nan), torch.full_like(weights.out[part], torch.nan)
    small = (None if base is None else base[part], [x[part] for x in models])
    run(*small, ours)
    with backend("reference"):
        run(*small, expected)
    _compare(name, ours, expected)

    nbytes = sum(x.nbytes for x in models) + (0 if base is None else base.nbytes) + weights.out.nbytes
    ceiling = Ceiling(nbytes)
    try:
        extra = extra_bytes(lambda: run(base, models, weights.out))
        times = interleave(
            {**{way: Contender(copy, math.inf) for way, copy in ceiling.ways().items()},
             name: Contender(lambda: run(base, models, weights.out), math.inf)},
            rounds=1000,
            enough=lambda so_far: len(so_far[name].ms) >= 3 and sum(sum(t.ms) for t in so_far.values()) > 500 * budget,
        )  # fmt: skip
        merge = times.pop(name)
        copies = [Times([ceiling.scale * ms for ms in t.ms]) for t in times.values()]
        copy = min(copies, key=lambda t: t.median)
    finally:
        ceiling.close()
    dtype = str(weights.out.dtype).removeprefix("torch.")
    return Timing(
        name, len(models), base is not None, weights.out.numel(), dtype, nbytes, merge.median / 1e3, copy.median / 1e3, ratio(merge, copy),
        len(merge.ms), extra,
    )  # fmt: skip


def _parameters(method: Method, count: int) -> dict[str, Any]:
    values = {}
    for p in method.parameters:
        value = _TYPICAL.get(p.recipe, p.default)
        if value is REQUIRED:
            raise ValueError(f"{method.name!r} cannot be timed: no value is known for its parameter {p.recipe!r}")
        values[p.name] = (value,) * count if p.per_model else value
    return values


def _compare(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    wrong = (got.view(bits) != expected.view(bits)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise WrongResult(
            f"{name}: {len(wrong)} of {got.numel()} elements are not the reference's, the first at {i}: {got[i].item()!r}, expected "
            f"{expected[i].item()!r}; please report this with the output of `pymerge env`"
        )
