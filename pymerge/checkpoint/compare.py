"""Whether the tensors of several models can be merged: same names, same shapes, numbers with numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..merge_methods.registry import Method
from ..recipe.problems import Problems, did_you_mean
from ..recipe.schema import Recipe
from . import dtypes
from .format import TensorInfo
from .parts import Part
from .tied import is_vocabulary
from .views import View

__all__ = ["Matched", "match_tensors"]

SHOWN = 5
"""Names spelt out per kind of difference: models that do not belong together differ in hundreds."""


@dataclass(frozen=True)
class Matched:
    """One tensor of the output and what it is made from.

    Attributes:
        name: in the output.
        inputs: place among the part's inputs -> the tensor there.
        merged: whether it goes through the method; otherwise it has one input, or several that must be equal, and is copied.
        rows: to which its inputs were cropped, None where they were not.
    """

    name: str
    inputs: dict[int, TensorInfo]
    merged: bool
    rows: int | None = None


def match_tensors(part: Part, views: Sequence[View | None], recipe: Recipe, method: Method | None, problems: Problems) -> list[Matched]:
    """The tensors of a part, in the order of the first input's files; differences that the recipe does not allow go to `problems`.

    Args:
        part: whose inputs to match.
        views: of the inputs; None for one that could not be opened, which is passed over.
        recipe: its policies count.
        method: what it can merge counts.
        problems: where everything wrong goes.
    """
    present = [i for i, view in enumerate(views) if view is not None]
    if not present:
        return []
    if recipe.missing_tensors == "error":
        names = _common(part, views, present, problems)
    else:
        names = list(dict.fromkeys(name for i in present for name in views[i]))
    compared = _Differences(part, problems)
    result = []
    for name in names:
        found = {i: views[i][name] for i in present if name in views[i]}
        merged = dtypes.is_merged(next(iter(found.values())).dtype)
        if len(found) < len(present):
            if recipe.missing_tensors == "drop":
                continue
            if recipe.missing_tensors == "keep" or not (merged and _can_merge(part, found, method)):
                first = next(iter(found))
                result.append(Matched(name, {first: found[first]}, False))
                continue
        rows = None
        if recipe.vocabulary == "crop":
            rows, found = _cropped(name, found)
        compared.check(name, found)
        result.append(Matched(name, found, merged, rows))
    compared.report()
    return result


def _common(part: Part, views: Sequence[View | None], present: list[int], problems: Problems) -> list[str]:
    """Names that all have; the others are problems, told once for each different input."""
    first = views[present[0]]
    first_name = part.inputs[present[0]].name
    common = dict.fromkeys(first)
    for i in _different(part, present)[1:]:
        which, view = part.inputs[i], views[i]
        missing = [name for name in first if name not in view]
        extra = [name for name in view if name not in first]
        policy = "; the recipe's 'missing_tensors' can say what to do"
        if missing:
            hint = did_you_mean(missing[0], extra) if len(extra) < 2000 else ""
            problems.add(which.place, f"{which.name} lacks {_listed(missing)} that {first_name} has{hint or policy}")
        if extra:
            problems.add(which.place, f"{which.name} has {_listed(extra)} that {first_name} lacks{'' if missing else policy}")
        for name in missing:
            common.pop(name, None)
    return list(common)


def _different(part: Part, present: Iterable[int]) -> list[int]:
    """Of inputs that are the same layers of the same checkpoint, the first."""
    return list({(part.inputs[i].index, part.inputs[i].layers): i for i in reversed(list(present))}.values())[::-1]


def _can_merge(part: Part, found: Mapping[int, TensorInfo], method: Method | None) -> bool:
    """Whether the method has enough to work with."""
    models = len(found) - (part.has_base and 0 in found)
    return method is not None and (not part.has_base or 0 in found) and models >= max(method.min_models, 1)


def _cropped(name: str, found: dict[int, TensorInfo]) -> tuple[int | None, dict[int, TensorInfo]]:
    """Embeddings and heads that differ in their number of rows alone, cut to the fewest. Rows lie one after another, so the first bytes of
    a tensor are its first rows."""
    shapes = {info.shape for info in found.values()}
    if len(shapes) == 1 or not is_vocabulary(name) or len({shape[1:] for shape in shapes}) > 1 or () in shapes:
        return None, found
    rows = min(shape[0] for shape in shapes)
    cut = {}
    for i, info in found.items():
        shape = (rows, *info.shape[1:])
        cut[i] = dataclasses.replace(info, shape=shape, nbytes=math.prod(shape) * dtypes.BITS[info.dtype] // 8)
    return rows, cut


class _Differences:
    """Shapes and kinds of dtypes that differ, told a few at a time."""

    def __init__(self, part: Part, problems: Problems) -> None:
        self._part = part
        self._problems = problems
        self._found: dict[tuple[int, str], list[str]] = {}

    def check(self, name: str, found: Mapping[int, TensorInfo]) -> None:
        """Compare each with the first."""
        order = _different(self._part, found)
        a, first = found[order[0]], self._part.inputs[order[0]].name
        for i in order[1:]:
            b, other = found[i], self._part.inputs[i].name
            if a.shape != b.shape:
                text = f"{name!r} is {_shape(b.shape)} in {other} and {_shape(a.shape)} in {first}"
                self._found.setdefault((i, "shape"), []).append(text + self._vocabulary_hint(name, a, b))
            if a.dtype != b.dtype and not (dtypes.is_merged(a.dtype) and dtypes.is_merged(b.dtype)):
                text = f"{name!r} is of dtype {b.dtype} in {other} and {a.dtype} in {first}; only floating dtypes may differ"
                self._found.setdefault((i, "kind"), []).append(text)

    @staticmethod
    def _vocabulary_hint(name: str, a: TensorInfo, b: TensorInfo) -> str:
        if not is_vocabulary(name) or a.shape[1:] != b.shape[1:]:
            return ""
        return "; 'tokenizer_source' matches tokens, 'vocabulary' (crop or pad) only numbers of rows"

    def report(self) -> None:
        """Tell what was found."""
        for (i, _), messages in sorted(self._found.items()):
            place = self._part.inputs[i].place
            for message in messages[:SHOWN]:
                self._problems.add(place, message)
            if len(messages) > SHOWN:
                self._problems.add(place, f"... and {len(messages) - SHOWN} more tensors like that")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def _shape(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
