"""Whether the tensors of several checkpoints can be merged: same names, same shapes, numbers with numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..recipe.problems import Problems, did_you_mean
from . import dtypes
from .sources import Sources

__all__ = ["compare_tensors"]

SHOWN = 5
"""Names spelt out per kind of difference: models that do not belong together differ in hundreds."""


def compare_tensors(sources: Sources, problems: Problems) -> list[str]:
    """Names of the tensors that all inputs have, in the order of the first one's files; differences go to `problems`."""
    if not sources.inputs:
        return []
    first = sources.checkpoints[sources.inputs[0]].tensors
    first_name = sources.names[0]
    common = dict.fromkeys(first)
    checked = {sources.inputs[0]}
    for index, model, place in zip(sources.inputs[1:], sources.names[1:], sources.places[1:], strict=True):
        if index in checked:
            continue
        checked.add(index)
        tensors = sources.checkpoints[index].tensors
        missing = [name for name in first if name not in tensors]
        extra = [name for name in tensors if name not in first]
        if missing:
            hint = did_you_mean(missing[0], extra) if len(extra) < 2000 else ""
            problems.add(place, f"{model} lacks {_listed(missing)} that {first_name} has{hint}")
        if extra:
            problems.add(place, f"{model} has {_listed(extra)} that {first_name} lacks")
        for name in missing:
            common.pop(name, None)
        shapes, kinds = [], []
        for name in common:
            a, b = first[name], tensors[name]
            if a.shape != b.shape:
                shapes.append(f"{name!r} is {_shape(b.shape)} in {model} and {_shape(a.shape)} in {first_name}")
            if a.dtype != b.dtype and not (dtypes.is_merged(a.dtype) and dtypes.is_merged(b.dtype)):
                kinds.append(f"{name!r} is of dtype {b.dtype} in {model} and {a.dtype} in {first_name}; only floating dtypes may differ")
        for messages in (shapes, kinds):
            for message in messages[:SHOWN]:
                problems.add(place, message)
            if len(messages) > SHOWN:
                problems.add(place, f"... and {len(messages) - SHOWN} more tensors like that")
    return list(common)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def _shape(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
