"""The shape of a recipe: which keys it may have and of what type. What the values mean is decided when a plan is made."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from ..checkpoint.dtypes import CHOICES, parse_dtype
from .chat_templates import parse_chat_template
from .entries import ModelEntry, ModuleEntry, SliceEntry, kind_of, parse_models, parse_modules, parse_parameters, parse_slices
from .problems import Path, Problems, did_you_mean
from .reference import ModelReference, parse_reference
from .source import Source, read_source
from .tokenizer import TokenizerSpec, parse_tokenizer, parse_tokenizer_source

__all__ = ["ModelEntry", "Recipe", "load_recipe", "parse_recipe", "yaml_text"]

KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "missing_tensors", "vocabulary", "name",
)  # fmt: skip
PARTS = ("models", "slices", "modules")

POLICIES = {"missing_tensors": ("error", "drop", "keep", "merge"), "vocabulary": ("error", "crop", "pad")}


@dataclass(frozen=True)
class Recipe:
    """A recipe whose shape is right.

    Attributes:
        merge_method: name of the method.
        models, slices, modules: what is merged; one of the three.
        base_model: as written.
        parameters: global ones, unchecked.
        dtype, out_dtype: safetensors codes ("BF16") or None.
        tokenizer: of the output, from ``tokenizer`` or ``tokenizer_source``; None: the donor's, and no embedding is moved.
        chat_template: "auto", a built-in one's name, or Jinja text; None: the donor's.
        missing_tensors: what to do about a tensor that not all models have: "error", "drop" it, "keep" the first model's as it is, or
            "merge" those that there are.
        vocabulary: what to do about embeddings with different numbers of rows: "error", "crop" to the fewest or "pad" to the most.
        name: of this merge, by which others in the same file use its result.
        folder: of the recipe's file; relative paths are looked up there first.
    """

    merge_method: str
    models: tuple[ModelEntry, ...] = ()
    base_model: ModelReference | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    folder: FilePath | None = None
    slices: tuple[SliceEntry, ...] = ()
    modules: dict[str, ModuleEntry] = field(default_factory=dict)
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    missing_tensors: str = "error"
    vocabulary: str = "error"
    name: str | None = None

    def references(self) -> list[tuple[Path, ModelReference]]:
        """Every place that names a model, and the model: the base first, then in the order of the recipe."""
        found: list[tuple[Path, ModelReference | None]] = [(("base_model",), self.base_model)]
        for path, part in [((), ModuleEntry(self.models, self.slices)), *((("modules", name), m) for name, m in self.modules.items())]:
            found += [((*path, "models", i, "model"), entry.model) for i, entry in enumerate(part.models)]
            for k, piece in enumerate(part.slices):
                found += [((*path, "slices", k, "sources", i, "model"), entry.model) for i, entry in enumerate(piece.sources)]
                found.append(((*path, "slices", k, "base_model"), piece.base_model))
        if self.tokenizer:
            found.append((("tokenizer", "source"), self.tokenizer.model))
            found += [(("tokenizer", "tokens", token, "source"), spec.model) for token, spec in self.tokenizer.tokens.items()]
        return [(path, reference) for path, reference in found if reference is not None]

    def replace(self, **changes) -> Recipe:
        """The same recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The recipe in its format, keys in a fixed order, without what is not set."""
        from ..checkpoint.dtypes import name_of

        full = {
            "name": self.name,
            "merge_method": self.merge_method,
            "base_model": self.base_model and self.base_model.to_value(),
            "models": [entry.to_value() for entry in self.models],
            "slices": [entry.to_value() for entry in self.slices],
            "modules": {name: entry.to_value() for name, entry in self.modules.items()},
            "parameters": self.parameters,
            "dtype": self.dtype and name_of(self.dtype),
            "out_dtype": self.out_dtype and name_of(self.out_dtype),
            "tokenizer": self.tokenizer and self.tokenizer.to_value(),
            "chat_template": self.chat_template,
            "missing_tensors": None if self.missing_tensors == "error" else self.missing_tensors,
            "vocabulary": None if self.vocabulary == "error" else self.vocabulary,
        }
        return {key: value for key, value in full.items() if value not in (None, {}, [])}

    def to_yaml(self) -> str:
        """The recipe as YAML: the same text for the same recipe, however it was written."""
        return yaml_text(self.to_dict())


def yaml_text(content: Any) -> str:
    """Plain values as YAML, in their order and without aliases."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**6)


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
        problems.add((), f"a recipe is a mapping with the keys {', '.join(KEYS)}; this is {kind_of(data)}")
        data = {}
    else:
        _check_keys(data, problems)
    method = data.get("merge_method")
    if not isinstance(method, str) or not method:
        if isinstance(source.data, Mapping):
            what = "is missing" if method is None else f"is {kind_of(method)}; write the name of a method"
            problems.add(("merge_method",), f"{what} (`pymerge methods` lists them)")
        method = ""
    parts = _parts(data, problems) if isinstance(source.data, Mapping) else Recipe("")
    base = data.get("base_model")
    return parts.replace(
        merge_method=method,
        base_model=None if base is None else parse_reference(base, ("base_model",), problems),
        parameters=parse_parameters(data.get("parameters"), ("parameters",), problems),
        dtype=_dtype(data.get("dtype"), ("dtype",), problems),
        out_dtype=_dtype(data.get("out_dtype"), ("out_dtype",), problems),
        folder=source.folder,
        tokenizer=_tokenizer(data, problems),
        chat_template=parse_chat_template(data.get("chat_template"), ("chat_template",), problems),
        name=parse_name(data.get("name"), ("name",), problems),
        **{key: _policy(data.get(key), key, problems) for key in POLICIES},
    )


def _check_keys(data: Mapping, problems: Problems) -> None:
    for key in data:
        if key not in KEYS:
            problems.add((key,), "unknown key" + (did_you_mean(key, KEYS) or "; a recipe has " + ", ".join(KEYS)))


def _parts(data: Mapping, problems: Problems) -> Recipe:
    """A recipe with what is merged."""
    given = [key for key in PARTS if data.get(key) is not None]
    if not given:
        problems.add(("models",), "is missing; list the models to merge (or write 'slices' or 'modules')")
        return Recipe("")
    if len(given) > 1:
        problems.add((given[1],), f"is given beside '{given[0]}'; a recipe has one of {', '.join(PARTS)}")
    parse = {"models": parse_models, "slices": parse_slices, "modules": parse_modules}
    return Recipe("", **{key: parse[key](data[key], (key,), problems) for key in given})


def _tokenizer(data: Mapping, problems: Problems) -> TokenizerSpec | None:
    source, full = data.get("tokenizer_source"), data.get("tokenizer")
    if source is not None and full is not None:
        problems.add(("tokenizer_source",), "is given beside 'tokenizer'; write it as the tokenizer's 'source'")
    if full is not None:
        return parse_tokenizer(full, ("tokenizer",), problems)
    return None if source is None else parse_tokenizer_source(source, ("tokenizer_source",), problems)


def _policy(value: Any, key: str, problems: Problems) -> str:
    options = POLICIES[key]
    if value is None:
        return options[0]
    if value not in options:
        problems.add((key,), f"is {kind_of(value)}" + (did_you_mean(value, options) or "; choose " + ", ".join(options)))
        return options[0]
    return value


def parse_name(value: Any, path: Path, problems: Problems) -> str | None:
    """A merge's name, which is that of its folder too."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[\w][\w .-]{0,99}", value) or value.endswith((".", " ", ".safetensors")):
        problems.add(path, f"is {value!r}; write letters, digits, '_', '-' and '.': it becomes the name of a folder")
        return None
    return value


def _dtype(value: Any, path: Path, problems: Problems) -> str | None:
    if value is None:
        return None
    code = parse_dtype(value) if isinstance(value, str) else None
    if code is None:
        problems.add(path, f"{kind_of(value)} is not a dtype{did_you_mean(value, CHOICES) or '; choose ' + ', '.join(CHOICES)}")
    return code
