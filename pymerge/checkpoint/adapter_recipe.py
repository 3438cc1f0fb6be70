"""A recipe whose models are all LoRA adapters: merged with each other into a new adapter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from ..recipe.locate import existing_paths
from ..recipe.problems import Problems, RecipeError, did_you_mean
from ..recipe.source import Source, read_source
from .dtypes import check_dtype
from .lora.config import CONFIG
from .provenance import FILE_NAME

if TYPE_CHECKING:
    from .lora.job import MergeJob
    from .merge import MergeReport

__all__ = ["adapter_arguments", "adapters_planned", "is_adapter_recipe", "merge_adapter_recipe", "raised_as_problems"]

KEYS = ("merge_method", "models", "parameters", "dtype", "out_dtype")
OWN = ("weight", "rank", "energy", "on", "any_base")
"""Parameters of merging adapters itself; all others are the method's."""


def is_adapter_recipe(recipe: Any) -> bool:
    """Whether every model of a recipe is a folder with an adapter. Whatever is wrong with the recipe otherwise, False."""
    try:
        if not isinstance(recipe, Mapping) and not FilePath(recipe).is_file():
            return False  # a pipe can be read only once, and the plan has to read it
        source = read_source(recipe)
    except (RecipeError, TypeError, OSError, ValueError):
        return False
    folders = _folders(source)
    return bool(folders) and all(folder is not None for folder in folders)


def _folders(source: Source) -> list[FilePath | None]:
    models = source.data.get("models") if isinstance(source.data, Mapping) else None
    entries = models if isinstance(models, list) else []
    return [_folder(entry.get("model") if isinstance(entry, Mapping) else None, source.folder) for entry in entries]


def _folder(text: Any, folder: FilePath | None) -> FilePath | None:
    """The adapter that a recipe's text means: looked up as models are, in the recipe's folder first."""
    if not isinstance(text, str):
        return None
    try:
        return next((path for path in existing_paths(text, folder)[0] if (path / CONFIG).is_file()), None)
    except (OSError, ValueError):
        return None


def merge_adapter_recipe(
    recipe: str | os.PathLike | Mapping,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    seed: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge the adapters that a recipe names, see :func:`pymerge.merge_adapters`.

    The recipe has ``merge_method`` ("cat", "svd" or any other), ``models``, ``dtype`` of the result, and ``parameters``: ``weight`` (per
    model too), ``rank``, ``energy``, ``on``, ``any_base``, and those of the method. Values are plain: no gradients, no filters.

    Args:
        recipe: for which :func:`is_adapter_recipe` holds.
        out: folder to make.
        dtype, seed: override the recipe's.
        force: replace an existing `out`.
        progress: see :func:`pymerge.merge_adapters`.

    Raises:
        RecipeError: with everything that is wrong with the recipe.
        CheckpointError, OSError: as :func:`pymerge.merge_adapters`.
    """
    from .adapters import merge_adapters
    from .merge import MergeReport

    began = time.perf_counter()
    source = read_source(recipe)
    problems = Problems(source.label, source.lines)
    with raised_as_problems(problems, out):
        report = merge_adapters(out=out, force=force, progress=progress, **adapter_arguments(source, problems, dtype=dtype, seed=seed))
    files = tuple(report.out / name for name in ("adapter_model.safetensors", CONFIG, FILE_NAME, "README.md"))
    seconds = time.perf_counter() - began
    return MergeReport(report.out, files, 2 * len(report.ranks), report.bytes_read, report.nbytes, seconds, report.warnings)


@contextmanager
def adapters_planned(
    recipe: str | os.PathLike | Mapping, out: FilePath | None, *, dtype: str | None = None, seed: int | None = None, force: bool = False
) -> Iterator[MergeJob]:
    """What :func:`merge_adapter_recipe` would do: its job, with every check made that can be made without reading a tensor.

    Raises:
        RecipeError, CheckpointError: it would not do it.
    """
    from .lora.job import open_job
    from .lora.save import check_place

    source = read_source(recipe)
    problems = Problems(source.label, source.lines)
    with raised_as_problems(problems, out):
        arguments = adapter_arguments(source, problems, dtype=dtype, seed=seed)
        check_dtype(arguments.pop("dtype"))
        with open_job(**arguments) as job:
            if out is not None:
                check_place(out.absolute(), force, job.adapters)
            yield job


@contextmanager
def raised_as_problems(problems: Problems, out: str | os.PathLike | None) -> Iterator[None]:
    """What is wrong with a recipe's values, or with `out`, is raised as a RecipeError."""
    try:
        yield
    except (ValueError, FileExistsError) as error:
        if type(error) not in (ValueError, FileExistsError):  # CheckpointError and NonFiniteError speak for themselves
            raise
        if isinstance(error, FileExistsError):
            problems.add_elsewhere(str(out), str(error).partition(": ")[2] or str(error))
        else:
            problems.add(("parameters",), str(error))
        problems.raise_if_any()


def adapter_arguments(source: Source, problems: Problems, *, dtype: str | None = None, seed: int | None = None) -> dict[str, Any]:
    """The arguments of :func:`pymerge.merge_adapters`, but for `out` and `force`, that a recipe stands for.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    data = source.data
    for key in data:
        if key not in KEYS:
            reason = (
                "adapters are merged without their base; to merge adapted models name them base+adapter" if key == "base_model" else None
            )
            problems.add((key,), reason or f"unknown key{did_you_mean(key, KEYS)}; a recipe for adapters has {', '.join(KEYS)}")
    parameters = _parameters(data, problems)
    if seed is not None:
        parameters["seed"] = seed
    method = data.get("merge_method")
    if not isinstance(method, str):
        problems.add(("merge_method",), "is missing or no text; write cat, svd or the name of another method")
    problems.raise_if_any()
    weights = parameters.pop("weight", None)
    own = {key: parameters.pop(key) for key in OWN if key in parameters}
    any_base = own.pop("any_base", False)
    if not isinstance(any_base, bool):
        problems.add(("parameters", "any_base"), f"is {any_base!r}, neither true nor false")
        problems.raise_if_any()
    asked = dtype or data.get("out_dtype") or data.get("dtype")
    settings = {"method": method, "weights": weights, "parameters": parameters, "dtype": asked, "check_base": not any_base}
    return {"adapters": _folders(source), **settings, **own}


def _parameters(data: Mapping, problems: Problems) -> dict[str, Any]:
    """Parameters of all levels: one value, or a list with one per model where some model has its own."""
    result = _plain(data.get("parameters"), ("parameters",), problems)
    own = [_plain(entry.get("parameters"), ("models", i, "parameters"), problems) for i, entry in enumerate(data["models"])]
    for i, entry in enumerate(data["models"]):
        for key in entry:
            if key not in ("model", "parameters"):
                problems.add(("models", i, key), f"unknown key{did_you_mean(key, ('model', 'parameters'))}")
    for key in dict.fromkeys(key for values in own for key in values):
        if key in OWN and key != "weight":
            problems.add(("parameters", key), "is for the whole merge; write it under the global parameters")
        default = result.get(key, 1.0 if key == "weight" else None)
        values = [values.get(key, default) for values in own]
        if None in values:
            problems.add(("models", values.index(None), "parameters", key), "is given for some models only; give it for all, or globally")
        result[key] = values
    return result


def _plain(values: Any, path: tuple, problems: Problems) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        problems.add(path, "is not a mapping of names to values")
        return {}
    for key, value in values.items():
        if isinstance(value, (list, tuple, Mapping)):
            problems.add((*path, key), f"is {value!r}; adapters are merged with one value for all layers")
    return {str(key): value for key, value in values.items() if not isinstance(value, (list, tuple, Mapping))}
