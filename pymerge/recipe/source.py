"""A recipe's text as plain values, with the line of every key and list item."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from .problems import Path, Problem, RecipeError, did_you_mean

__all__ = ["Source", "parse_text", "read_source", "read_sources"]

MAX_BYTES = 4_000_000
MAX_VALUES = 200_000
MAX_DEPTH = 100


@dataclass(frozen=True)
class Source:
    """Where a recipe came from and what it says.

    Attributes:
        label: its file name, or "recipe".
        folder: against which relative model paths are looked up first; None for a recipe that is not a file.
        data: plain values.
        lines: path of each key and list item -> line, from 1.
    """

    label: str
    folder: FilePath | None
    data: Any
    lines: dict[Path, int] = field(default_factory=dict)


def read_source(recipe: str | os.PathLike | Mapping) -> Source:
    """Read a recipe from a YAML file, a .json file, or take a mapping as it is.

    Raises:
        RecipeError: the file cannot be read or parsed, or holds several recipes.
    """
    sources = read_sources(recipe)
    if len(sources) > 1:
        raise _failure(sources[0].label, None, f"holds {len(sources)} recipes, and one is wanted here; `pymerge merge` takes them all")
    return sources[0]


def read_sources(recipe: str | os.PathLike | Mapping) -> list[Source]:
    """Every recipe of a file: a YAML file may hold several, one in each of its documents.

    Raises:
        RecipeError: the file cannot be read or parsed.
    """
    if isinstance(recipe, Mapping):
        return [Source("recipe", None, recipe)]
    if not isinstance(recipe, str | os.PathLike):
        raise TypeError(f"recipe is a {type(recipe).__name__}; pass a path or a mapping")
    path = FilePath(recipe)
    label = str(path)
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        raise _failure(label, None, f"cannot be read: {_reason(error, path)}") from None
    if len(raw) > MAX_BYTES:
        raise _failure(label, None, f"is {len(raw)} bytes long; a recipe has at most {MAX_BYTES}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _failure(label, None, f"is not UTF-8 text (byte {error.start})") from None
    return parse_text(text, label, path.parent, path.suffix == ".json")


def _reason(error: OSError | ValueError, path: FilePath) -> str:
    if isinstance(error, IsADirectoryError):
        return "it is a folder, and a recipe is a YAML or JSON file"
    if isinstance(error, FileNotFoundError):
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"there is no such file{did_you_mean(path.name, beside) or '; check the path'}"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def parse_text(text: str, label: str, folder: FilePath | None, is_json: bool = False) -> list[Source]:
    """Every recipe of a text.

    Raises:
        RecipeError: it cannot be parsed.
    """
    try:
        documents = [(_parse_json(text, label), {})] if is_json else _parse_yaml(text, label)
    except RecursionError:
        raise _failure(label, None, "is nested too deep") from None
    return [Source(label, folder, data, lines) for data, lines in documents]


def _failure(label: str, line: int | None, message: str) -> RecipeError:
    return RecipeError([Problem(label, line, "", message)])


def _parse_json(text: str, label: str) -> Any:
    def unique(pairs: list) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise _failure(label, None, f"key {twice!r} occurs twice in one object")
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise _failure(label, error.lineno, f"is not valid JSON: {error.msg}") from None
    except RecipeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise _failure(label, None, f"is not valid JSON: {error}") from None


def _parse_yaml(text: str, label: str) -> list[tuple[Any, dict[Path, int]]]:
    import yaml

    try:
        loader = _loader(text)
        documents = []
        try:
            while loader.check_node():
                node = loader.get_node()
                reader = _NodeReader(loader, label)
                documents.append((reader.value(node, ()), reader.lines))
        finally:
            loader.dispose()
        if len(documents) > 1:  # a separator with nothing behind it makes no recipe
            documents = [document for document in documents if document[0] is not None]
        return documents or [(None, {})]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _failure(label, mark.line + 1 if mark else None, f"is not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise _failure(label, None, f"is not valid YAML: {error}") from None
    except RecipeError:
        raise
    except ValueError as error:  # a scalar that looks like a date but is none
        raise _failure(label, None, f"is not valid YAML: {error}") from None


def _loader(text: str):
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses deep nesting before its scanner, which takes a second for each thousand of open brackets, has gone through it."""

        def fetch_flow_collection_start(self, token_class) -> None:
            if self.flow_level > MAX_DEPTH:
                raise RecursionError
            super().fetch_flow_collection_start(token_class)

    return Loader(text)


class _NodeReader:
    """Plain values of a YAML node tree; SafeLoader alone would forget the lines and let a key that occurs twice pass."""

    def __init__(self, loader, label: str) -> None:
        self.lines: dict[Path, int] = {}
        self._loader = loader
        self._label = label
        self._inside: set[int] = set()
        self._count = 0

    def value(self, node, path: Path) -> Any:
        import yaml

        self._count += 1
        if self._count > MAX_VALUES:  # aliases of aliases grow exponentially
            raise _failure(self._label, None, f"has more than {MAX_VALUES} values")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._inside:
            raise _failure(self._label, node.start_mark.line + 1, "contains itself through an alias")
        self._inside.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._inside.discard(id(node))

    def _scalar(self, node) -> Any:
        try:
            return self._loader.construct_object(node)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # PyYAML lets these through: `!!timestamp x`
            line, text = node.start_mark.line + 1, node.value[:80]
            raise _failure(self._label, line, f"is not valid YAML: {text!r} is not of the type {node.tag.rpartition(':')[2]!r}") from None

    def _mapping(self, node, path: Path) -> dict:
        import yaml

        result: dict = {}
        own = sum(key.tag != "tag:yaml.org,2002:merge" for key, _ in node.value)
        self._loader.flatten_mapping(node)  # puts what `<<: *alias` brings in front
        inherited = len(node.value) - own
        seen: set = set()
        for i, (key_node, value_node) in enumerate(node.value):
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise _failure(self._label, line, "has a key that is a list or a mapping")
            key = self._scalar(key_node)
            if i >= inherited:
                if key in seen:
                    raise _failure(self._label, line, f"key {key!r} occurs twice in one mapping")
                seen.add(key)
            self.lines[(*path, key)] = line
            result[key] = self.value(value_node, (*path, key))
        return result
