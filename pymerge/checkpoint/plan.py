"""From a recipe and the headers of its models to a plan: what is read, merged and written. Everything wrong is found here, at once."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import merge_methods  # noqa: F401 - registers the built-in methods
from .._version import __version__
from ..merge_methods.registry import Method, get_method, methods
from ..recipe.problems import Problems, did_you_mean
from ..recipe.schema import Recipe, parse_recipe
from ..recipe.source import Source, read_source
from . import dtypes
from .align import Alignment, align_vocabularies, pad_vocabularies
from .changes import Changes, choose_chat_template, layer_changes
from .compare import Matched, match_tensors
from .device import Device
from .extras import files_to_copy
from .format import TensorInfo
from .layout import Layout, OutputTensor, make_layout
from .memory import Schedule, make_schedule
from .parts import Input, Part, make_parts
from .settings import resolve_parameters
from .sources import Sources, open_sources
from .store import TensorStore
from .target import check_out, is_file_target
from .tied import Ties, find_ties
from .views import Views

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
        changes: to these files.
        alignment: of the models' vocabularies, which replaces some of these files.
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
    changes: Changes
    alignment: Alignment | None
    warnings: tuple[str, ...]

    def schedule(self, memory: int | None = None, *, done: Container[str] = (), device: Device | None = None) -> Schedule:
        """The work, cut up to fit a memory budget; see :func:`pymerge.checkpoint.memory.make_schedule`."""
        return make_schedule(self.tensors, self.method, self.recipe.dtype, memory, done, device)

    @property
    def bytes_read(self) -> int:
        """Of tensors, in all."""
        return sum(sum(info.nbytes for info in _distinct(tensor.inputs)) for tensor in self.tensors)

    @property
    def bytes_written(self) -> int:
        """Of tensors, in all."""
        return self.layout.total_size

    @property
    def nbytes_on_disk(self) -> int:
        """Of the whole output: its weights' files, and about as much as the donor has beside them."""
        return _on_disk(self.layout, self.donor)

    def close(self) -> None:
        """Close the checkpoints' files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _on_disk(layout: Layout, donor: Path | None) -> int:
    beside = sum(path.stat().st_size for path in files_to_copy(donor))
    return sum(shard.size for shard in layout.shards) + len(layout.index or b"") + beside


def _distinct(inputs: tuple[tuple[int, TensorInfo], ...]) -> list[TensorInfo]:
    return list({(index, info.name): info for index, info in inputs}.values())


def make_plan(
    recipe: str | os.PathLike | Mapping | Recipe | Source,
    out: str | os.PathLike | None = None,
    *,
    shard_size: int = 5_000_000_000,
    force: bool = False,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    download: bool = False,
    named: Mapping[str, Path] | None = None,
    planned: Mapping[Path, TensorStore] | None = None,
) -> Plan:
    """Check a recipe against the models it names and lay out the work. Reads headers and config.json, no tensors; writes nothing.

    Args:
        recipe: a YAML or JSON file, a mapping of the same form, or either of them read already.
        out: where the result is to go, to check that too: a folder, or a .safetensors file. None plans for a folder.
        shard_size: bytes of tensors in one file, at most; a larger tensor has a file of its own.
        force: an existing `out` may be replaced, an unfinished one thrown away.
        resume: an unfinished `out` may be continued.
        download: fetch models that the recipe names by hub id and that are not in the Hugging Face cache.
        named: paths of models that the recipe names by the names of other recipes in its file.
        planned: what stands for checkpoints that are not there yet, by path.
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
    sources = open_sources(parsed, problems, download, named, planned)
    try:
        return _complete(parsed, method, sources, problems, None if out is None else Path(out), shard_size, force, resume)
    except BaseException:
        sources.close()
        raise


def _read(recipe) -> tuple[Recipe, Problems]:
    if isinstance(recipe, Recipe):
        return recipe, Problems()
    source = recipe if isinstance(recipe, Source) else read_source(recipe)
    problems = Problems(source.label, source.lines)
    return parse_recipe(source, problems), problems


def _override(recipe: Recipe, dtype: str | None, out_dtype: str | None) -> Recipe:
    changes = {}
    for key, value in (("dtype", dtype), ("out_dtype", out_dtype)):
        if value is not None:
            changes[key] = dtypes.parse_dtype(str(value))
            if changes[key] is None:
                raise ValueError(f"{key} {value!r} is not a dtype; choose {', '.join(dtypes.CHOICES)}")
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
    recipe: Recipe,
    method: Method | None,
    sources: Sources,
    problems: Problems,
    out: Path | None,
    shard_size: int,
    force: bool,
    resume: bool,
) -> Plan:
    parts = make_parts(recipe, method, sources, problems)
    ties = find_ties(sources)
    alignment = _align_vocabularies(recipe, parts, sources, ties, problems)
    if ties.kept:
        heads, models = ", ".join(sorted(ties.hidden)), " and ".join(ties.kept)
        problems.warnings.append(f"{heads} of {models} is tied to the embeddings (by config.json) and is not written a second time")
    views = Views(sources, ties, tuple(recipe.modules), problems)
    matched = []
    for part in parts:
        seen = [views.view(part, each) if each.index is not None else None for each in part.inputs]
        matched.append(match_tensors(part, seen, recipe, method, problems))
    views.warn_unplaced(("slices",))
    parameters = resolve_parameters(method, parts, matched, views, sources.complete, problems) if method is not None else []
    changes = _changes(recipe, parts, matched, sources, ties, views, problems)
    single = out is not None and is_file_target(out)
    if single and recipe.chat_template is not None:
        problems.warn(("chat_template",), "has no effect: the output is one file, without a tokenizer")
    tensors: list[TensorPlan] = []
    layout = Layout((), None, 0)
    if not problems:
        for part, own, values in zip(parts, matched, parameters, strict=True):
            tensors += [_tensor_plan(tensor, part, values.get(tensor.name, {}), recipe) for tensor in own]
        _check_tensors(tensors, problems)
    if not problems:
        metadata = {"format": "pt", "pymerge_version": __version__, "pymerge_recipe": recipe.to_yaml()}
        layout = make_layout([t.output for t in tensors], shard_size, metadata, out.name if single else None)
    if out is not None:
        check_out(out, force, _on_disk(layout, None if single else sources.donor_folder), sources, problems, resume)
    problems.raise_if_any()
    assert method is not None
    return Plan(
        recipe=recipe,
        method=method,
        checkpoints=tuple(sources.checkpoints),
        names=tuple(sources.names),
        bases=frozenset(part.inputs[0].index for part in parts if part.has_base),
        tensors=tuple(tensors),
        layout=layout,
        donor=None if single else sources.donor_folder,
        changes=changes,
        alignment=alignment,
        warnings=tuple(problems.warnings),
    )


def _align_vocabularies(recipe: Recipe, parts: Sequence[Part], sources: Sources, ties: Ties, problems: Problems) -> Alignment | None:
    """The one place where checkpoints are replaced by ones whose embeddings follow the output's vocabulary."""
    if not sources.complete or (recipe.tokenizer is None and recipe.vocabulary != "pad"):
        return None
    merged = {each.index for part in parts for each in part.inputs}
    base = sources.indices[recipe.base_model] if recipe.base_model is not None else None
    if recipe.tokenizer is None:
        alignment = pad_vocabularies(sources, merged, base, ties.aliases, problems)
    else:
        alignment = align_vocabularies(recipe.tokenizer, sources, merged, base, ties.aliases, problems)
    if alignment is None:
        problems.raise_if_any()  # shapes that differ for want of it would only hide what is wrong
    sources.checkpoints[:] = alignment.stores
    return alignment


def _changes(
    recipe: Recipe, parts: Sequence[Part], matched: Sequence[list[Matched]], sources: Sources, ties: Ties, views: Views, problems: Problems
) -> Changes:
    """What config.json and the chat template of the output have to say."""
    template = choose_chat_template(recipe.chat_template, sources, problems)
    if problems or sources.donor is None:
        return Changes(chat_template=template)
    config = sources.configs[sources.donor]
    changes: dict[tuple[str, ...], Any] = {}
    if ties.untied and config is not None:
        changes[("tie_word_embeddings",)] = False
    rows = {tensor.rows for tensors in matched for tensor in tensors if tensor.rows is not None}
    for keys in (("vocab_size",), ("text_config", "vocab_size")):
        inner = (config or {}).get(keys[0]) if len(keys) > 1 else config
        if rows and isinstance(inner, dict) and isinstance(inner.get("vocab_size"), int):
            changes[keys] = min(rows)
    for module in dict.fromkeys(part.module for part in parts if part.cut is not None):
        cuts = [part for part in parts if part.module == module]
        donor = Input(sources.donor, sources.names[sources.donor], ("base_model",), {}, (0, 1))
        stack = views.stack(donor, cuts[0])
        try:
            slices = [(sources.configs[p.models[0].index], *p.models[0].layers) for p in cuts]
            changes.update(layer_changes(config, *stack, module, slices) if stack else {})
        except ValueError as error:
            problems.add(cuts[0].place[:-2], f"{sources.names[sources.donor]}: {error}")
    return Changes(changes, template)


def _tensor_plan(tensor: Matched, part: Part, parameters: dict[str, Any], recipe: Recipe) -> TensorPlan:
    inputs = tuple((part.inputs[i].index, info) for i, info in tensor.inputs.items())
    first = inputs[0][1]
    code = first.dtype
    if tensor.merged:
        code = recipe.out_dtype or recipe.dtype or dtypes.promote(info.dtype for _, info in inputs)
    has_base = part.has_base and tensor.merged
    return TensorPlan(OutputTensor(tensor.name, code, first.shape), inputs, has_base, parameters, not tensor.merged)


def _check_tensors(tensors: Sequence[TensorPlan], problems: Problems) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.output.name in names:
            problems.add(("modules",), f"{tensor.output.name!r} belongs to different modules in different models")
        names.add(tensor.output.name)
    if not tensors:
        problems.add(("missing_tensors",), "leaves no tensor: there is none that all models have")
