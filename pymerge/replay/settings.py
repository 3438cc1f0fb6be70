"""The settings of a mixer: checked, and turned into what schedules are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from .schedule import exact_fraction

__all__ = ["choose", "share_of", "sources_of", "stages_of"]


def choose(what: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{what} is {value!r}; choose {' or '.join(map(repr, options))}")


def sources_of(new: Any, old: Any) -> tuple[list[str], list[Any]]:
    olds = dict(old) if isinstance(old, Mapping) else {"old": old}
    if "new" in olds:
        raise ValueError("an old source cannot be called 'new'")
    for name, data in {"new": new, **olds}.items():
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise TypeError(
                f"{name!r} is a {type(data).__name__} without length and index; pass a list or a map-style "
                "dataset, or use iter_replay_stream"
            )
    if not olds:
        raise ValueError("old is an empty mapping; name at least one old source")
    return ["new", *olds], [new, *olds.values()]


def share_of(ratio: float | None, probability: float | None, policy: str) -> Fraction:
    if ratio is not None and probability is not None:
        raise ValueError("give ratio (the old share of the stream) or probability (of an old sample after a new one), not both")
    if probability is not None:
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability is {probability}; it must be between 0 and 1")
        p = exact_fraction(probability)
        return p / (1 + p)
    ratio = 0.10 if ratio is None else ratio
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio is {ratio}; it is the old samples' share of the stream, at least 0 and below 1 (10 % is 0.1)")
    if policy == "bernoulli" and ratio > 0.5:
        raise ValueError(f"ratio is {ratio}; with at most one old sample after each new one it is at most 0.5. Use policy='exact'")
    return exact_fraction(ratio)


def stages_of(names, sizes, weights, schedule, needed: bool) -> list[tuple[int, list[float]]]:
    """(first place, weights of the old sources in order), the first at 0."""
    first = weights if weights is not None else dict(zip(names, sizes))
    stages = []
    for place, given in [(0, first), *schedule]:
        unknown = sorted(set(given) - set(names))
        missing = [name for name in names if name not in given]
        if unknown or missing:
            problem = f"unknown {', '.join(map(repr, unknown))}" if unknown else f"missing {', '.join(map(repr, missing))}"
            raise ValueError(f"weights from place {place} on: {problem}; there are {', '.join(map(repr, names))}")
        row = [float(given[name]) for name in names]
        bad = [f"{name!r} {w}" for name, w in zip(names, row) if not (w >= 0 and math.isfinite(w))]
        if bad:
            raise ValueError(f"weights from place {place} on must be finite and not negative: {', '.join(bad)}")
        if needed and not sum(row):
            empty = not sum(sizes)
            raise ValueError("the old data are empty; a ratio above 0 needs some" if empty else f"all weights from place {place} on are 0")
        for name, size, weight in zip(names, sizes, row):
            if needed and weight and not size:
                raise ValueError(f"{name!r} is empty and has weight {weight}; give it 0")
        if stages and place <= stages[-1][0]:
            raise ValueError(f"schedule: place {place} comes after {stages[-1][0]}; places must ascend from 1")
        stages.append((place, row))
    return stages if needed else [(0, [1.0] * len(names))]
