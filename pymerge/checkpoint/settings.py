"""The parameters of every tensor, tried out on a small one before any real tensor is read."""

from __future__ import annotations

from typing import Any

from ..merge_methods.registry import Method
from ..recipe.layers import LayerDepths
from ..recipe.parameters import Parameters
from ..recipe.problems import Problems
from ..recipe.schema import Recipe
from . import dtypes
from .sources import Sources

__all__ = ["is_built_in", "resolve_parameters"]


def is_built_in(method: Method) -> bool:
    """Whether a method is pymerge's own, which all keep the project's arithmetic: computing in fp32 whatever the tensors are stored in."""
    return method.tensor.__module__.partition(".")[0] == "pymerge"


def resolve_parameters(recipe: Recipe, method: Method, sources: Sources, names: list[str], problems: Problems) -> dict[str, dict[str, Any]]:
    """Keywords for the method by tensor name; everything wrong goes to `problems`."""
    before = bool(problems)
    parameters = Parameters(method, recipe, sources.merged, sources.ignored, problems)
    if not sources.inputs or not sources.complete:
        # Without its models the layers are unknown, but what is required and missing for every tensor can be told all the same.
        parameters.resolve("", LayerDepths(()))
        parameters.report_missing(1)
        return {}
    tensors = sources.checkpoints[sources.inputs[0]].tensors
    depths = LayerDepths(tensors)
    merged = [name for name in names if dtypes.is_merged(tensors[name].dtype)]
    resolved = {name: parameters.resolve(name, depths) for name in merged}
    parameters.report_missing(len(merged))
    parameters.warn_unused_filters(names)
    _require_one_ranking(method, resolved, problems)
    if (before or not problems) and is_built_in(method) and not _has_none(method, resolved):
        _try_out(method, len(sources.merged), sources.has_base, resolved, problems)
    return resolved


def _require_one_ranking(method: Method, resolved: dict[str, dict[str, Any]], problems: Problems) -> None:
    """Tensors that are ranked together have to agree on how."""
    if method.whole_model is None or problems:
        return
    try:
        keys = {name: method.whole_model(**values) for name, values in resolved.items()}
    except (ValueError, TypeError):  # is said when the values are tried out
        return
    together = {name: key for name, key in keys.items() if key is not None}
    first = next(iter(together), None)
    other = next((name for name in together if together[name] != together[first]), None)
    if other is not None:
        problems.add(
            ("parameters",),
            f"ranks over the whole model need the same densities and convention for all tensors; those of {first!r} and {other!r} differ",
        )


def _has_none(method: Method, resolved: dict[str, dict[str, Any]]) -> bool:
    """Whether a value is None that no default explains: what is wrong with it has been said."""
    for parameter in method.parameters:
        for values in resolved.values():
            value = values[parameter.name]
            if parameter.default is not None and (value is None or (isinstance(value, tuple) and None in value)):
                return True
    return False


def _try_out(method: Method, count: int, has_base: bool, resolved: dict[str, dict[str, Any]], problems: Problems) -> None:
    """Call the method once for each set of values that occurs: what it refuses, it refuses now."""
    import torch

    from ..ops import backend

    example = torch.tensor([0.5, -0.25, 1.0, 2.0])
    models = [example * (1.0 + 0.125 * (i + 1)) for i in range(count)]
    tried: set[str] = set()
    refused: dict[str, str] = {}
    with backend("reference"):
        for name, values in resolved.items():
            key = repr(values)
            if key in tried:
                continue
            tried.add(key)
            try:
                method.tensor(example if has_base else None, models, name=name, dtype=torch.float32, out=None, check_finite=False, **values)
            except (ValueError, TypeError) as error:
                refused.setdefault(str(error), name)
    for message, name in refused.items():
        problems.add(("parameters",), f"{method.name!r} does not take these values: {message} (first for tensor {name!r})")
