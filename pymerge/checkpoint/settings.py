"""The parameters of every tensor, tried out on a small one before any real tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..merge_methods.registry import Method
from ..recipe.parameters import Level, Parameters
from ..recipe.problems import Path as Place
from ..recipe.problems import Problems
from .compare import Matched
from .parts import Part
from .views import Views

__all__ = ["is_built_in", "resolve_parameters"]


def is_built_in(method: Method) -> bool:
    """Whether a method is pymerge's own, which all keep the project's arithmetic: computing in fp32 whatever the tensors are stored in."""
    return method.tensor.__module__.partition(".")[0] == "pymerge"


def resolve_parameters(
    method: Method, parts: Sequence[Part], matched: Sequence[list[Matched]], views: Views, complete: bool, problems: Problems
) -> list[dict[str, dict[str, Any]]]:
    """For each part: keywords for the method by tensor name; everything wrong goes to `problems`."""
    before = bool(problems)
    parameters = Parameters(method, problems)
    levels: dict[Place, Level] = {}

    def level(place: Place, given: dict[str, Any], of_model: bool = False) -> Level:
        if place not in levels:
            levels[place] = parameters.level(given, place, of_model)
        return levels[place]

    resolved: list[dict[str, dict[str, Any]]] = []
    seen: set[str] = set()
    for part, tensors in zip(parts, matched, strict=True):
        shared = [level(*each) for each in part.levels]
        own = [level(x.parameters_place, x.parameters, True) if x.place[-1] == "model" else Level(("parameters",)) for x in part.models]
        for place in part.unused:
            problems.warn(place, "have no effect: this is the base model, and deltas are taken from it")
        resolved.append({})
        if not complete:
            # Without its models the layers are unknown, but what is required and missing for every tensor can be told all the same.
            parameters.resolve("", 0.0, shared, own, [""] * len(own))
            continue
        depth = views.depths(part)
        for tensor in tensors:
            names = {i: info.name for i, info in tensor.inputs.items()}
            seen.update((tensor.name, *names.values()))
            if tensor.merged:
                of_models = [i for i in names if i >= part.has_base]
                resolved[-1][tensor.name] = parameters.resolve(
                    tensor.name, depth(tensor.name), shared, [own[i - part.has_base] for i in of_models], [names[i] for i in of_models]
                )
    parameters.report_missing()
    if complete:
        parameters.warn_unused_filters(seen)
        _require_one_ranking(method, resolved, problems)
        if (before or not problems) and is_built_in(method):
            for part, values in zip(parts, resolved, strict=True):
                if _can_be_called(method, part) and not _has_none(method, values):
                    _try_out(method, part, values, problems)
    return resolved


def _require_one_ranking(method: Method, resolved: Sequence[dict[str, dict[str, Any]]], problems: Problems) -> None:
    """Tensors that are ranked together have to agree on how."""
    if method.whole_model is None or problems:
        return
    try:
        keys = {name: method.whole_model(**values) for part in resolved for name, values in part.items()}
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


def _can_be_called(method: Method, part: Part) -> bool:
    """Whether there is a base if one is needed, and as many models as the method takes: where not, that has been said."""
    return (part.has_base or method.base != "required") and method.min_models <= len(part.models) <= method.max_models


def _has_none(method: Method, resolved: dict[str, dict[str, Any]]) -> bool:
    """Whether a value is None that no default explains: what is wrong with it has been said."""
    for parameter in method.parameters:
        for values in resolved.values():
            value = values[parameter.name]
            if parameter.default is not None and (value is None or (isinstance(value, tuple) and None in value)):
                return True
    return False


def _try_out(method: Method, part: Part, resolved: dict[str, dict[str, Any]], problems: Problems) -> None:
    """Call the method once for each set of values that occurs: what it refuses, it refuses now."""
    import torch

    from ..ops import backend

    example = torch.tensor([0.5, -0.25, 1.0, 2.0])
    models = [example * (1.0 + 0.125 * (i + 1)) for i in range(len(part.models))]
    per_model = next((p.name for p in method.parameters if p.per_model), None)
    tried: set[str] = set()
    refused: dict[str, str] = {}
    with backend("reference"):
        for name, values in resolved.items():
            key = repr(values)
            if key in tried:
                continue
            tried.add(key)
            some = models[: len(values[per_model])] if per_model else models
            base = example if part.has_base else None
            try:
                method.tensor(base, some, name=name, dtype=torch.float32, out=None, check_finite=False, **values)
            except (ValueError, TypeError) as error:
                refused.setdefault(str(error), name)
    for message, name in refused.items():
        text = f"{method.name!r} does not take these values: {message} (first for tensor {name!r})"
        problems.add(part.levels[0][0] if part.levels[0][1] else ("parameters",), text)
