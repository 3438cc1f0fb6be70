"""The checkpoints that a recipe names, found and opened, each once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipe.locate import Located, locate
from ..recipe.problems import Path as Place
from ..recipe.problems import Problems
from ..recipe.reference import ModelReference
from ..recipe.schema import Recipe
from .extras import read_config
from .format import CheckpointError
from .lora import AdaptedCheckpoint, open_adapter
from .quantised import sign_of_quantisation
from .reader import open_checkpoint
from .store import TensorStore

__all__ = ["Sources", "open_sources"]


@dataclass
class Sources:
    """Opened checkpoints.

    Attributes:
        checkpoints: each once, however often it is named.
        names: of the checkpoints, as the recipe writes them first.
        places: where in the recipe that is.
        configs: of the checkpoints: their config.json, None where there is none.
        indices: reference -> index into `checkpoints`, None for one that could not be opened.
        donor: index of the base, or else of the first model: config and tokenizer of the output are its.
        complete: whether all could be opened.
    """

    checkpoints: list[TensorStore] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    configs: list[dict[str, Any] | None] = field(default_factory=list)
    indices: dict[ModelReference, int | None] = field(default_factory=dict)
    donor: int | None = None
    complete: bool = True

    @property
    def donor_folder(self) -> Path | None:
        """Where the donor's config and tokenizer lie."""
        return None if self.donor is None else self.checkpoints[self.donor].folder

    def close(self) -> None:
        """Close all files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()


def open_sources(
    recipe: Recipe,
    problems: Problems,
    download: bool = False,
    named: Mapping[str, Path] | None = None,
    planned: Mapping[Path, TensorStore] | None = None,
) -> Sources:
    """Open what a recipe names; everything wrong goes to `problems`. For `download`, `named` and `planned` see :func:`.plan.make_plan`."""
    sources = Sources()
    opened: dict[tuple[Path, ...], int | None] = {}
    for place, reference in recipe.references():
        if reference in sources.indices:
            continue
        located = locate(reference, recipe.folder, place, problems, download, named)
        index = None
        if located is not None:
            key = tuple(path.resolve() for path in (located.path, *located.adapters))
            if key not in opened:
                opened[key] = _open(located, str(reference), place, sources, problems, planned or {})
            index = opened[key]
        sources.indices[reference] = index
        sources.complete &= index is not None
    named = [sources.indices[reference] for place, reference in recipe.references() if place[0] != "tokenizer"]
    if recipe.base_model is not None and sources.indices[recipe.base_model] is not None:
        sources.donor = sources.indices[recipe.base_model]
    else:
        sources.donor = next((index for index in named if index is not None), None)
    return sources


def _open(
    located: Located, name: str, place: Place, sources: Sources, problems: Problems, planned: Mapping[Path, TensorStore]
) -> int | None:
    path = located.path
    try:
        store = planned[path] if path in planned else open_checkpoint(path)
        config = read_config(store.folder)
        sign = sign_of_quantisation(store, config)
        for adapter in located.adapters:
            store = AdaptedCheckpoint(store, open_adapter(adapter))
    except CheckpointError as error:
        problems.add(place, str(error))
        return None
    if sign:
        problems.add(place, f"{path} is quantised ({sign}); stored codes cannot be merged: dequantise it first")
    if not store.tensors:
        problems.add(place, f"{path} has no tensors")
    for warning in getattr(store, "warnings", ()):
        problems.warn(place, warning)
    sources.checkpoints.append(store)
    sources.names.append(name)
    sources.places.append(place)
    sources.configs.append(config)
    return len(sources.checkpoints) - 1
