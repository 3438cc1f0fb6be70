"""From a recipe and the headers of its models to a plan: what is read, merged and written. Everything wrong is found here, at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import merge_methods  # noqa: F401 - registers the built-in methods
from .._version import __version__
from ..merge_methods.registry import Method, get_method, methods
from ..recipe.problems import Problems, did_you_mean
from ..recipe.schema import Recipe, parse_recipe
from ..recipe.source import read_source
from . import dtypes
from .compare import compare_tensors
from .format import TensorInfo
from .layout import Layout, OutputTensor, make_layout
from .memory import Schedule, make_schedule
from .settings import resolve_parameters
from .sources import Sources, open_sources
from .store import TensorStore
from .target import check_out
from .writer import is_file_target

__all__ = ["Plan", "TensorPlan", "make_plan"]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        output: its name, dtype and shape.
        inputs: (index into ``Plan.checkpoints``, the tensor there) for the base, if there is one, and then each model. The names may
            differ from the output's, and the number of inputs from tensor to tensor.
        has_base: whether the first input is the base.
        parameters: keywords for the method.
        copied: it is not of numbers to merge (integers, booleans): it must be the same everywhere and is copied.
    """

    output: OutputTensor
    inputs: tuple[tuple[int, TensorInfo], ...]
    has_base: bool
    parameters: dict[str, Any]
    copied: bool


@dataclass(frozen=True)
class Plan:
    """A merge, ready to run.

    Attributes:
        recipe: what was asked for.
        method: of merging.
        checkpoints: each store of tensors once, opened.
        names: of the checkpoints as the recipe writes them.
        bases: indices of the checkpoints that deltas are taken from.
        tensors: in the order in which they are merged, that of the first checkpoint's files.
        layout: of the files to write.
        donor: the folder whose config and tokenizer are copied.
        warnings: what looks like a mistake.
    """

    recipe: Recipe
    method: Method
    checkpoints: tuple[TensorStore, ...]
    names: tuple[str, ...]
    bases: frozenset[int]
    tensors: tuple[TensorPlan, ...]
    layout: Layout
    donor: Path | None
    warnings: tuple[str, ...]

    def schedule(self, memory: int | None = None) -> Schedule:
        """The work, cut up to fit a memory budget; see :func:`pymerge.checkpoint.memory.make_schedule`."""
        return make_schedule(self.tensors, self.method, self.recipe.dtype, memory)

    @property
    def bytes_read(self) -> int:
        """Of tensors, in all."""
        return sum(sum(info.nbytes for info in _distinct(tensor.inputs)) for tensor in self.tensors)

    @property
    def bytes_written(self) -> int:
        """Of tensors, in all."""
        return self.layout.total_size

    def close(self) -> None:
        """Close the checkpoints' files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _distinct(inputs: tuple[tuple[int, TensorInfo], ...]) -> list[TensorInfo]:
    return list({(index, info.name): info for index, info in inputs}.values())


def make_plan(
    recipe: str | os.PathLike | Mapping | Recipe,
    out: str | os.PathLike | None = None,
    *,
    shard_size: int = 5_000_000_000,
    force: bool = False,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int | None = None,
) -> Plan:
    """Check a recipe against the models it names and lay out the work. Reads headers and config.json, no tensors; writes nothing.

    Args:
        recipe: a YAML or JSON file, a mapping of the same form, or a :class:`Recipe`.
        out: where the result is to go, to check that too: a folder, or a .safetensors file. None plans for a folder.
        shard_size: bytes of tensors in one file, at most; a larger tensor has a file of its own.
        force: an existing `out` may be replaced.
        dtype, out_dtype, seed: override the recipe's; dtypes as torch calls them ("bfloat16").

    Raises:
        RecipeError: with everything that is wrong.
    """
    parsed, problems = _read(recipe)
    parsed = _override(parsed, dtype, out_dtype)
    method = _method(parsed, problems)
    if seed is not None and method is not None:
        if any(p.recipe == "seed" for p in method.parameters):
            parsed = parsed.replace(parameters={**parsed.parameters, "seed": seed})
        else:
            problems.warnings.append(f"the seed is not used: {method.name!r} is not random")
    sources = open_sources(parsed, method, problems)
    try:
        return _complete(parsed, method, sources, problems, None if out is None else Path(out), shard_size, force)
    except BaseException:
        for checkpoint in sources.checkpoints:
            checkpoint.close()
        raise


def _read(recipe) -> tuple[Recipe, Problems]:
    if isinstance(recipe, Recipe):
        return recipe, Problems()
    source = read_source(recipe)
    problems = Problems(source.label, source.lines)
    return parse_recipe(source, problems), problems


def _override(recipe: Recipe, dtype: str | None, out_dtype: str | None) -> Recipe:
    changes = {}
    for key, value in (("dtype", dtype), ("out_dtype", out_dtype)):
        if value is not None:
            changes[key] = dtypes.parse_dtype(str(value))
            if changes[key] is None:
                raise ValueError(f"{key} {value!r} is not a dtype; choose float32, bfloat16, float16 or float64")
    return recipe.replace(**changes)


def _method(recipe: Recipe, problems: Problems) -> Method | None:
    if not recipe.merge_method:
        return None
    if recipe.merge_method in methods():
        return get_method(recipe.merge_method)
    hint = did_you_mean(recipe.merge_method, methods())
    problems.add(("merge_method",), f"there is no method {recipe.merge_method!r}{hint or f'; there are {chr(44).join(methods())}'}")
    return None


def _complete(
    recipe: Recipe, method: Method | None, sources: Sources, problems: Problems, out: Path | None, shard_size: int, force: bool
) -> Plan:
    names = compare_tensors(sources, problems)
    parameters = resolve_parameters(recipe, method, sources, names, problems) if method is not None else {}
    single = out is not None and is_file_target(out)
    tensors: list[TensorPlan] = []
    layout = Layout((), None, 0)
    if not problems:
        for name in names:
            inputs = tuple((index, sources.checkpoints[index].tensors[name]) for index in sources.inputs)
            tensors.append(_tensor_plan(name, inputs, sources.has_base, parameters.get(name, {}), recipe))
        metadata = {"format": "pt", "pymerge_version": __version__, "pymerge_recipe": recipe.to_yaml()}
        layout = make_layout([t.output for t in tensors], shard_size, metadata, out.name if single else None)
    if out is not None:
        check_out(out, force, layout.total_size, sources, problems)
    problems.raise_if_any()
    assert method is not None
    return Plan(
        recipe=recipe,
        method=method,
        checkpoints=tuple(sources.checkpoints),
        names=tuple(
            sources.names[sources.inputs.index(i)] if i in sources.inputs else str(c.path) for i, c in enumerate(sources.checkpoints)
        ),
        bases=frozenset(sources.inputs[:1] if sources.has_base else ()),
        tensors=tuple(tensors),
        layout=layout,
        donor=None if single else sources.donor,
        warnings=tuple(problems.warnings),
    )


def _tensor_plan(
    name: str, inputs: tuple[tuple[int, TensorInfo], ...], has_base: bool, parameters: dict[str, Any], recipe: Recipe
) -> TensorPlan:
    first = inputs[0][1]
    copied = not dtypes.is_merged(first.dtype)
    if copied:
        code = first.dtype
    else:
        code = recipe.out_dtype or recipe.dtype or dtypes.promote(info.dtype for _, info in inputs)
    return TensorPlan(OutputTensor(name, code, first.shape), inputs, has_base, parameters, copied)
