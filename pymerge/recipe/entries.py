"""What a recipe merges: whole models, slices of their layers, or modules made of either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .problems import Path, Problems, did_you_mean
from .reference import ModelReference, parse_reference

__all__ = ["ModelEntry", "ModuleEntry", "SliceEntry", "kind_of", "parse_models", "parse_modules", "parse_parameters", "parse_slices"]


@dataclass(frozen=True)
class ModelEntry:
    """A model, and the parameters given with it, unchecked. In a slice: layers ``layer_range[0]`` to ``layer_range[1] - 1`` of it."""

    model: ModelReference
    parameters: dict[str, Any] = field(default_factory=dict)
    layer_range: tuple[int, int] | None = None

    def to_value(self) -> dict[str, Any]:
        """What a recipe writes for it."""
        layers = {"layer_range": list(self.layer_range)} if self.layer_range else {}
        return {"model": self.model.to_value(), **layers, **_if_any("parameters", self.parameters)}


@dataclass(frozen=True)
class SliceEntry:
    """Some layers of the output, merged from as many layers of each source."""

    sources: tuple[ModelEntry, ...]
    base_model: ModelReference | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many."""
        first, last = self.sources[0].layer_range or (0, 0)
        return last - first

    def to_value(self) -> dict[str, Any]:
        """What a recipe writes for it."""
        base = {"base_model": self.base_model.to_value()} if self.base_model else {}
        return {"sources": [s.to_value() for s in self.sources], **base, **_if_any("parameters", self.parameters)}


@dataclass(frozen=True)
class ModuleEntry:
    """A part of the model with layers of its own, such as a vision tower: whole models' part, or slices of it."""

    models: tuple[ModelEntry, ...] = ()
    slices: tuple[SliceEntry, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)

    def to_value(self) -> dict[str, Any]:
        """What a recipe writes for it."""
        parts = {"slices": [s.to_value() for s in self.slices]} if self.slices else {"models": [m.to_value() for m in self.models]}
        return {**parts, **_if_any("parameters", self.parameters)}


def _if_any(key: str, value: dict[str, Any]) -> dict[str, Any]:
    return {key: value} if value else {}


def kind_of(value: Any) -> str:
    """How to call a value that is not what it should be."""
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return repr(value)


def parse_models(value: Any, path: Path, problems: Problems) -> tuple[ModelEntry, ...]:
    """``models``; empty when anything in it is wrong."""
    return _items(value, path, problems, "'- model: PATH'", lambda item, place: _model(item, place, problems, sliced=False))


def parse_slices(value: Any, path: Path, problems: Problems) -> tuple[SliceEntry, ...]:
    """``slices``; empty when anything in it is wrong."""
    return _items(value, path, problems, "'- sources: [...]'", lambda item, place: _slice(item, place, problems))


def parse_modules(value: Any, path: Path, problems: Problems) -> dict[str, ModuleEntry]:
    """``modules``; empty when anything in it is wrong."""
    if not isinstance(value, Mapping) or not value:
        problems.add(path, f"is {kind_of(value)}; write each module's name with its 'models' or 'slices' below it")
        return {}
    modules = {}
    for name, item in value.items():
        place = (*path, name)
        if not isinstance(name, str) or not isinstance(item, Mapping):
            problems.add(place, f"is {kind_of(item)}; write the module's 'models' or 'slices' below its name")
            continue
        _unknown(item, ("models", "slices", "parameters"), place, problems)
        given = [key for key in ("models", "slices") if item.get(key) is not None]
        if len(given) != 1:
            problems.add(place, f"has {'both' if given else 'neither'} 'models' {'and' if given else 'nor'} 'slices'; it needs one of them")
            continue
        models = parse_models(item["models"], (*place, "models"), problems) if given == ["models"] else ()
        slices = parse_slices(item["slices"], (*place, "slices"), problems) if given == ["slices"] else ()
        parameters = parse_parameters(item.get("parameters"), (*place, "parameters"), problems)
        if models or slices:
            modules[name] = ModuleEntry(models, slices, parameters)
    return modules if len(modules) == len(value) else {}


def parse_parameters(value: Any, path: Path, problems: Problems) -> dict[str, Any]:
    """``parameters`` of any level: names to values that are checked when the method is known."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.add(path, f"is {kind_of(value)}; write a mapping of names to values")
        return {}
    return dict(value)


def _items(value: Any, path: Path, problems: Problems, item_form: str, parse) -> tuple:
    if not isinstance(value, list | tuple) or not value:
        problems.add(path, f"is {kind_of(value)}; write a list with an item {item_form} for each")
        return ()
    parsed = [parse(item, (*path, i)) for i, item in enumerate(value)]
    return tuple(parsed) if None not in parsed else ()


def _model(item: Any, path: Path, problems: Problems, sliced: bool) -> ModelEntry | None:
    keys = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
    if not isinstance(item, Mapping):
        problems.add(path, f"is {kind_of(item)}; write '- model: PATH', and its {'layer_range' if sliced else 'parameters'} below")
        return None
    _unknown(item, keys, path, problems, {"layer_range": "is for the sources of 'slices'"})
    layers = _layer_range(item.get("layer_range"), (*path, "layer_range"), problems) if sliced else None
    parameters = parse_parameters(item.get("parameters"), (*path, "parameters"), problems)
    if item.get("model") is None:
        problems.add((*path, "model"), "is missing; write the path of a checkpoint")
        return None
    model = parse_reference(item["model"], (*path, "model"), problems)
    if model is None or (sliced and layers is None):
        return None
    return ModelEntry(model, parameters, layers)


def _layer_range(value: Any, path: Path, problems: Problems) -> tuple[int, int] | None:
    if value is None:
        problems.add(path, "is missing; write [first layer, layer after the last]")
        return None
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    if not whole or not 0 <= value[0] < value[1]:
        problems.add(path, f"is {value!r}; write [first layer, layer after the last], counted from 0")
        return None
    return value[0], value[1]


def _slice(item: Any, path: Path, problems: Problems) -> SliceEntry | None:
    if not isinstance(item, Mapping):
        problems.add(path, f"is {kind_of(item)}; write '- sources: [...]'")
        return None
    keys = ("sources", "base_model", "parameters", "residual_weight")
    _unknown(item, keys, path, problems)
    if item.get("residual_weight") is not None:
        problems.warn((*path, "residual_weight"), "has no effect, in mergekit neither")
    base = None
    if item.get("base_model") is not None:
        base = parse_reference(item["base_model"], (*path, "base_model"), problems)
    place = (*path, "sources")
    form = "'- {model: PATH, layer_range: [0, 8]}'"
    sources = _items(item.get("sources"), place, problems, form, lambda source, p: _model(source, p, problems, sliced=True))
    parameters = parse_parameters(item.get("parameters"), (*path, "parameters"), problems)
    if not sources:
        return None
    lengths = [source.layer_range[1] - source.layer_range[0] for source in sources]
    if len(set(lengths)) > 1:
        problems.add(place, f"have {', '.join(map(str, lengths))} layers; all sources of a slice need the same number")
        return None
    return SliceEntry(sources, base, parameters)


def _unknown(item: Mapping, keys: tuple[str, ...], path: Path, problems: Problems, known: Mapping[str, str] | None = None) -> None:
    for key in item:
        if key not in keys:
            hint = (
                f"; it {known[key]}"
                if known and key in known
                else did_you_mean(key, keys) or f"; an item has {' and '.join(map(repr, keys))}"
            )
            problems.add((*path, key), f"unknown key{hint}")
