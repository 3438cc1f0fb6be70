"""How a recipe names a model: a path or a hub id, perhaps with a revision and LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from .problems import Path, Problems, did_you_mean

__all__ = ["Location", "ModelReference", "parse_reference"]


@dataclass(frozen=True)
class Location:
    """A folder or file on disk, or a model on the hub at a revision (a branch, a tag or a commit; None: main)."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class ModelReference:
    """A model as a recipe names it.

    A text such as ``org/model@v2+./adapter`` is kept whole until it is looked up: a path that exists is taken as it is, whatever
    characters it has, so only then is it known whether ``+`` and ``@`` are marks. The dictionary form says it without marks.

    Attributes:
        model: where the model lies; for a text, the whole text.
        adapters: LoRA adapters to add, in this order.
        override_architecture: mergekit's; it has no effect, since nothing here depends on the architecture's name.
        marked: whether ``model.path`` is a text in which ``+`` and ``@`` may be marks.
    """

    model: Location
    adapters: tuple[Location, ...] = ()
    override_architecture: str | None = None
    marked: bool = False

    @classmethod
    def of(cls, text: str) -> ModelReference:
        """The reference that a text is."""
        return cls(Location(text), marked=True)

    def __str__(self) -> str:
        return "+".join(map(str, (self.model, *self.adapters)))

    def to_value(self) -> Any:
        """What a recipe writes for it."""
        if self.marked:
            return self.model.path
        value: dict[str, Any] = {"model": _location_value(self.model)}
        if self.adapters:
            loras = [_location_value(adapter) for adapter in self.adapters]
            value["lora"] = loras[0] if len(loras) == 1 else loras
        if self.override_architecture:
            value["override_architecture"] = self.override_architecture
        return value

    def stem(self, names: Container[str]) -> str | None:
        """Which of `names` the model is, without its adapters; None when it is none of them."""
        found = self.split(names.__contains__).model
        return found.path if found.revision is None and found.path in names else None

    def split(self, exists: Callable[[str], bool]) -> ModelReference:
        """The reference with its marks read, where it has any.

        The longest beginning that `exists` is the model's path; without one, the model ends at the first ``+``.

        Raises:
            ValueError: a part is empty or has several revisions.
        """
        if not self.marked or exists(self.model.path):
            return self if not self.marked else ModelReference(self.model, marked=False)
        pieces = self.model.path.split("+")
        for count in range(len(pieces) - 1, 1, -1):
            if exists("+".join(pieces[:count])):
                pieces[:count] = ["+".join(pieces[:count])]
                break
        locations = [_split_revision(piece, exists) for piece in pieces]
        return ModelReference(locations[0], tuple(locations[1:]))


def _split_revision(text: str, exists: Callable[[str], bool]) -> Location:
    path, mark, revision = text.rpartition("@")
    if not text or exists(text) or not mark:
        if not text:
            raise ValueError("a name is missing beside '+'")
        return Location(text)
    if not path or not revision:
        raise ValueError(f"{text!r} has nothing {'before' if not path else 'after'} its '@'")
    if "@" in path and not exists(path):
        raise ValueError(f"{text!r} has several '@'; a revision is given once")
    return Location(path, revision)


def _location_value(location: Location) -> dict[str, str]:
    return {"path": location.path, **({"revision": location.revision} if location.revision else {})}


def parse_reference(value: Any, path: Path, problems: Problems) -> ModelReference | None:
    """The model that a recipe's value names, None when it names none (which goes to `problems`)."""
    if isinstance(value, str) and value:
        return ModelReference.of(value)
    if not isinstance(value, Mapping):
        problems.add(path, f"is {_kind(value)}; write the path of a checkpoint or a hub id")
        return None
    keys = ("model", "lora", "override_architecture")
    good = True
    for key in value:
        if key not in keys:
            problems.add((*path, key), f"unknown key{did_you_mean(key, keys) or '; a model has ' + ', '.join(keys)}")
            good = False
    model = _parse_location(value.get("model"), (*path, "model"), problems)
    loras = value.get("lora")
    given = [] if loras is None else list(loras) if isinstance(loras, list | tuple) else [loras]
    adapters = [_parse_location(lora, (*path, "lora"), problems) for lora in given]
    override = value.get("override_architecture")
    if override is not None:
        if not isinstance(override, str):
            problems.add((*path, "override_architecture"), f"is {_kind(override)}; write text")
            return None
        problems.warn((*path, "override_architecture"), "has no effect: layers are told from the tensors' names, for any architecture")
    if not good or model is None or None in adapters:
        return None
    return ModelReference(model, tuple(a for a in adapters if a), override)


def _parse_location(value: Any, path: Path, problems: Problems) -> Location | None:
    if isinstance(value, str) and value:
        return Location(value)
    if isinstance(value, Mapping) and set(value) <= {"path", "revision"}:
        name, revision = value.get("path"), value.get("revision")
        if isinstance(name, str) and name and (revision is None or (isinstance(revision, str) and revision)):
            return Location(name, revision)
    problems.add(path, f"is {_kind(value)}; write a path, or a mapping with 'path' and 'revision'")
    return None


def _kind(value: Any) -> str:
    if value is None or value == "":
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else repr(value)
