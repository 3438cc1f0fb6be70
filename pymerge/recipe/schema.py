"""The shape of a recipe: which keys it may have and of what type. What the values mean is decided when a plan is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from .._version import __version__
from ..checkpoint.dtypes import CHOICES, parse_dtype
from .problems import Path, Problems, did_you_mean
from .source import Source, read_source

__all__ = ["ModelEntry", "Recipe", "load_recipe", "parse_recipe"]

KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
MODEL_KEYS = ("model", "parameters")
NOT_YET = {
    "slices": "list whole models under 'models'",
    "modules": "list whole models under 'models'",
    "tokenizer": "remove it: the tokenizer of the base model, or else of the first model, is copied",
    "tokenizer_source": "remove it: the tokenizer of the base model, or else of the first model, is copied",
    "chat_template": "remove it: the chat template of the base model, or else of the first model, is copied",
}


@dataclass(frozen=True)
class ModelEntry:
    """One item of ``models``: the path as written, and the parameters given with it, unchecked."""

    model: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe whose shape is right.

    Attributes:
        merge_method: name of the method.
        models: in the order written.
        base_model: path as written.
        parameters: global ones, unchecked.
        dtype, out_dtype: safetensors codes ("BF16") or None.
        folder: of the recipe's file; relative paths are looked up there first.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    folder: FilePath | None = None

    def replace(self, **changes) -> Recipe:
        """The same recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The recipe in its format, keys in a fixed order, without what is not set."""
        from ..checkpoint.dtypes import name_of

        models = [{"model": m.model, **({"parameters": m.parameters} if m.parameters else {})} for m in self.models]
        full = {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": models,
            "parameters": self.parameters,
            "dtype": self.dtype and name_of(self.dtype),
            "out_dtype": self.out_dtype and name_of(self.out_dtype),
        }
        return {key: value for key, value in full.items() if value not in (None, {})}

    def to_yaml(self) -> str:
        """The recipe as YAML: the same text for the same recipe, however it was written."""
        import yaml

        class Dumper(yaml.SafeDumper):
            def ignore_aliases(self, data: Any) -> bool:
                return True

        return yaml.dump(self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**6)


def load_recipe(recipe: str | os.PathLike | Mapping) -> Recipe:
    """Read a recipe and check its shape.

    Args:
        recipe: a YAML or JSON file, or a mapping of the same form.

    Raises:
        RecipeError: with everything that is wrong.
    """
    source = read_source(recipe)
    problems = Problems(source.label, source.lines)
    result = parse_recipe(source, problems)
    problems.raise_if_any()
    return result


def parse_recipe(source: Source, problems: Problems) -> Recipe:
    """What can be made of a recipe; everything wrong goes to `problems`. Parts that are wrong are left out."""
    data = source.data
    if not isinstance(data, Mapping):
        problems.add((), f"a recipe is a mapping with the keys {', '.join(KEYS)}; this is {_kind(data)}")
        data = {}
    else:
        _check_keys(data, problems)
    method = data.get("merge_method")
    if not isinstance(method, str):
        if isinstance(source.data, Mapping):
            what = "is missing" if method is None else f"is {_kind(method)}; write the name of a method"
            problems.add(("merge_method",), f"{what} (`pymerge methods` lists them)")
        method = ""
    return Recipe(
        merge_method=method,
        models=_models(data.get("models"), problems, isinstance(source.data, Mapping) and not {"slices", "modules"} & set(data)),
        base_model=_model_path(data["base_model"], ("base_model",), problems) if data.get("base_model") is not None else None,
        parameters=_parameters(data.get("parameters"), ("parameters",), problems),
        dtype=_dtype(data.get("dtype"), ("dtype",), problems),
        out_dtype=_dtype(data.get("out_dtype"), ("out_dtype",), problems),
        folder=source.folder,
    )


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return repr(value)


def _check_keys(data: Mapping, problems: Problems) -> None:
    for key in data:
        if key in NOT_YET:
            if data[key] is not None:
                problems.add((key,), f"is not supported by pymerge {__version__} yet; {NOT_YET[key]}")
        elif key not in KEYS:
            hint = did_you_mean(key, (*KEYS, *NOT_YET)) or f"; a recipe has {', '.join(KEYS)}"
            problems.add((key,), f"unknown key{hint}")


def _models(value: Any, problems: Problems, required: bool) -> tuple[ModelEntry, ...]:
    if value is None:
        if required:
            problems.add(("models",), "is missing; list the models to merge")
        return ()
    if not isinstance(value, list | tuple) or not value:
        what = "an empty list" if value == [] else _kind(value)
        problems.add(("models",), f"is {what}; write a list with an item '- model: PATH' for each")
        return ()
    entries = []
    for i, item in enumerate(value):
        path = ("models", i)
        if not isinstance(item, Mapping):
            problems.add(path, f"is {_kind(item)}; write '- model: PATH', and its parameters below")
            continue
        for key in item:
            if key not in MODEL_KEYS:
                hint = did_you_mean(key, MODEL_KEYS) or "; an item has 'model' and 'parameters'"
                problems.add((*path, key), f"unknown key{hint}")
        if item.get("model") is None:
            problems.add((*path, "model"), "is missing; write the path of a checkpoint")
            continue
        model = _model_path(item["model"], (*path, "model"), problems)
        entries.append(ModelEntry(model or "", _parameters(item.get("parameters"), (*path, "parameters"), problems)))
    return tuple(entries) if len(entries) == len(value) else ()


def _model_path(value: Any, path: Path, problems: Problems) -> str | None:
    if isinstance(value, Mapping):
        named = [key for key in ("lora", "override_architecture") if key in value] or ["a mapping"]
        problems.add(path, f"{' and '.join(named)} cannot be given for a model yet; write the path of a checkpoint")
        return None
    if not isinstance(value, str) or not value:
        problems.add(path, f"is {_kind(value)}; write the path of a checkpoint")
        return None
    return value


def _parameters(value: Any, path: Path, problems: Problems) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.add(path, f"is {_kind(value)}; write a mapping of names to values")
        return {}
    return dict(value)


def _dtype(value: Any, path: Path, problems: Problems) -> str | None:
    if value is None:
        return None
    code = parse_dtype(value) if isinstance(value, str) else None
    if code is None:
        problems.add(path, f"{_kind(value)} is not a dtype{did_you_mean(value, CHOICES) or '; choose ' + ', '.join(CHOICES)}")
    return code
