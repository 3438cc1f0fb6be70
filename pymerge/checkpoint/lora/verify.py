"""Does an adapter hold what its pymerge.json says? Modules are merged or extracted once more and compared bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...recipe.locate import existing_paths
from ...recipe.problems import Problems
from ...recipe.source import parse_text
from .. import dtypes
from ..adapter_recipe import adapter_arguments, raised_as_problems
from ..extras import read_small
from ..format import CheckpointError, load_json
from ..load import load_tensor
from ..provenance import FILE_NAME, parse_inputs
from ..reader import open_checkpoint
from ..verify_report import VerifyReport, files_differ
from .adapter import Adapter, open_adapter
from .config import CONFIG
from .extract import Change, Settings, adapter_settings, check_same, extract
from .factoring import one_thread
from .job import open_job
from .save import SavedModule, adapter_tensors, config_file

__all__ = ["verify_adapter"]


@dataclass(frozen=True)
class _Origin:
    """How to make an adapter again.

    Attributes:
        modules: that it has; None where that shows only when all are made.
        make: called with names of modules, or None for all: factors by module, and tensors that are stored whole.
        config: what else adapter_config.json says, given what `make` gave for all.
        files: of each input.
    """

    modules: tuple[str, ...] | None
    make: Callable[[Sequence[str] | None], tuple[Mapping[str, SavedModule], Mapping[str, Tensor]]]
    config: Callable[[Mapping[str, SavedModule], Mapping[str, Tensor]], Mapping[str, Any]]
    files: Sequence[Sequence[Path]]


def verify_adapter(
    out: Path, *, folder: Path | None, sample: int | None, seed: int, progress: Callable[[int, int], None] | None
) -> VerifyReport:
    """See :func:`pymerge.verify`. A sample is of modules: both factors of each are compared, and its scale."""
    path = out / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{out}: does not say how it was made: it has no {FILE_NAME}; what pymerge wrote has one")
    content = load_json(read_small(path), str(path))
    recorded = parse_inputs(content, path)
    with open_adapter(out) as written, _origin(content, path, folder) as origin:
        names = sorted(origin.modules if origin.modules is not None else written.modules)
        chosen = None if sample is None or sample >= len(names) else sorted(random.Random(seed).sample(names, sample))
        modules, others = origin.make(chosen)
        expected = adapter_tensors(modules, others)
        differences = _differences(written, expected, chosen)
        for name, module in modules.items():
            if name in written.modules and written.modules[name].scale != module.alpha / module.rank:
                differences.append((name, f"has the scale {written.modules[name].scale:g}; it would be {module.alpha / module.rank:g}"))
        if chosen is None and config_file(modules, origin.config(modules, others)) != read_small(out / CONFIG):
            differences.append((CONFIG, "is not what it would be"))
        if progress is not None:
            progress(1, 1)
        wrong = (
            [] if len(recorded) == len(origin.files) else [f"pymerge.json has {len(recorded)} inputs, and {len(origin.files)} were used"]
        )
        for (name, before), now in zip(recorded, origin.files):
            wrong += files_differ(name, before, now, hashes=sample is None)
        version = str(content["pymerge_version"])
        return VerifyReport(out, len(written.store.tensors), tuple(expected), tuple(differences), tuple(wrong), version)


def _differences(written: Adapter, expected: Mapping[str, Tensor], chosen: Sequence[str] | None) -> list[tuple[str, str]]:
    found, there = [], written.store.tensors
    for name, tensor in expected.items():
        if name not in there:
            found.append((name, "is missing"))
            continue
        got = load_tensor(written.store, there[name])
        if (got.dtype, got.shape) != (tensor.dtype, tensor.shape):
            now, then = (f"{dtypes.code_of(t.dtype)} {list(t.shape)}" for t in (got, tensor))
            found.append((name, f"is {now}, and would be {then}"))
            continue
        wrong = (got.contiguous().view(torch.uint8) != tensor.contiguous().view(torch.uint8)).flatten().nonzero()
        if len(wrong):
            off = float((got.double() - tensor.double()).abs().max() / tensor.double().abs().max().clamp_min(1e-300))
            first = int(wrong[0]) // tensor.element_size()
            found.append((name, f"differs from element {first} on, by {off:.1g} of its largest at most"))
    if chosen is None:
        found += [(name, "is not in the result") for name in there if name not in expected]
    return found


@contextmanager
def _origin(content: Mapping[str, Any], path: Path, folder: Path | None) -> Iterator[_Origin]:
    recipe, settings = content.get("recipe"), content.get("extract")
    if isinstance(recipe, str):
        with _merge(recipe, path, folder) as origin:
            yield origin
    elif isinstance(settings, dict):
        with _extraction(settings, path, folder) as origin:
            yield origin
    else:
        raise CheckpointError(f"{path}: is not as pymerge writes it: it has neither a recipe nor an extraction")


@contextmanager
def _merge(recipe: str, path: Path, folder: Path | None) -> Iterator[_Origin]:
    label = f"{path} (its recipe)"
    [source, *more] = parse_text(recipe, label, folder or Path())
    if more or not isinstance(source.data, dict) or not isinstance(source.data.get("models"), list):
        raise CheckpointError(f"{path}: its recipe is not one of adapters")
    for entry in source.data["models"]:
        if isinstance(entry, dict):
            entry["model"] = str(_found(entry.get("model"), path, folder))
    problems = Problems(label, source.lines)
    with raised_as_problems(problems, None):
        arguments = adapter_arguments(source, problems)
        code = dtypes.parse_dtype(str(arguments.pop("dtype")))
        if code is None:
            raise CheckpointError(f"{path}: its recipe has no dtype")
        with open_job(**arguments) as job:

            def make(names: Sequence[str] | None) -> tuple[dict[str, SavedModule], Mapping[str, Tensor]]:
                with one_thread():
                    return {name: job.saved(name, job.merge(name), code) for name in names or job.names}, job.shared

            yield _Origin(tuple(job.names), make, lambda *_: job.config(), [adapter.files for adapter in job.adapters])


@contextmanager
def _extraction(content: Mapping[str, Any], path: Path, folder: Path | None) -> Iterator[_Origin]:
    with (
        open_checkpoint(_found(content.get("model"), path, folder)) as model,
        open_checkpoint(_found(content.get("base"), path, folder)) as base,
    ):
        check_same(model, base)
        settings = _settings(content, path)

        def make(names: Sequence[str] | None) -> tuple[Mapping[str, SavedModule], Mapping[str, Tensor]]:
            change = extract(model, base, settings, None if names is None else {f"{name}.weight" for name in names})
            return change.modules, change.others

        def config(modules: Mapping[str, SavedModule], others: Mapping[str, Tensor]) -> Mapping[str, Any]:
            return adapter_settings(settings, Change(dict(modules), {}, dict(others), []), str(content.get("base_name")))

        yield _Origin(None, make, config, [model.files, base.files])


def _settings(content: Mapping[str, Any], path: Path) -> Settings:
    kinds = {
        "rank": int | None,
        "energy": float | None,
        "modules": str | None,
        "whole": list,
        "fan_in_fan_out": bool,
        "code": str | None,
    }
    for key, kind in kinds.items():
        if key not in content or not isinstance(content[key], kind):
            raise CheckpointError(f"{path}: is not as pymerge writes it: extract.{key} is {content.get(key)!r}")
    if content["code"] is not None and content["code"] not in dtypes.BITS:
        raise CheckpointError(f"{path}: is not as pymerge writes it: there is no dtype {content['code']!r}")
    return Settings(**{**{key: content[key] for key in kinds}, "whole": tuple(map(str, content["whole"]))})


def _found(text: Any, path: Path, folder: Path | None) -> Path:
    """What an adapter was made of: looked for in `folder`, or where we are, and then beside the adapter."""
    try:
        for start in (folder or Path(), path.absolute().parent.parent):
            found, _ = existing_paths(text, start)
            if found:
                return found[0].absolute()
    except (TypeError, ValueError):
        pass
    raise CheckpointError(f"{path}: {text!r}, which it was made of, cannot be found; --folder (folder=) says where relative paths start")
