"""The parts of a merge: tensors of the output that come from the same models, in the same roles, under the same parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..merge_methods.registry import Method
from ..recipe.entries import ModelEntry, ModuleEntry, SliceEntry
from ..recipe.problems import Path as Place
from ..recipe.problems import Problems
from ..recipe.reference import ModelReference
from ..recipe.schema import Recipe
from .sources import Sources

__all__ = ["Cut", "Input", "Part", "make_parts"]


@dataclass(frozen=True)
class Input:
    """A model in its role in a part.

    Attributes:
        index: into ``Sources.checkpoints``; None when it could not be opened.
        name: as the recipe writes it.
        place: in the recipe.
        parameters: given with it.
        layers: first layer and the one after the last, for a slice.
    """

    index: int | None
    name: str
    place: Place
    parameters: dict[str, Any]
    layers: tuple[int, int] | None = None

    @property
    def parameters_place(self) -> Place:
        """Where its parameters stand; for a base that is not listed, where all do."""
        return (*self.place[:-1], "parameters") if self.place[-1] == "model" else ("parameters",)


@dataclass(frozen=True)
class Cut:
    """Where a slice goes: its first layer in the output, how many layers, and whether it is the module's first and last."""

    start: int
    count: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Part:
    """See above.

    Attributes:
        place: of its list of models.
        inputs: the base, if there is one, and then the models.
        has_base: whether the first input is the base.
        unused: parameters that have no effect, since they stand with the base: their places.
        levels: (place, parameters) that hold for all of its models: of the slice, the module and the recipe.
        module: of a recipe with modules: its name.
        cut: of a slice.
    """

    place: Place
    inputs: tuple[Input, ...]
    has_base: bool
    unused: tuple[Place, ...]
    levels: tuple[tuple[Place, dict[str, Any]], ...]
    module: str | None = None
    cut: Cut | None = None

    @property
    def models(self) -> tuple[Input, ...]:
        """The inputs besides the base."""
        return self.inputs[1:] if self.has_base else self.inputs


def make_parts(recipe: Recipe, method: Method | None, sources: Sources, problems: Problems) -> list[Part]:
    """The parts of a recipe; roles that the method does not have go to `problems`."""
    maker = _Maker(recipe, method, sources, problems)
    named = recipe.modules.items() if recipe.modules else [(None, ModuleEntry(recipe.models, recipe.slices))]
    parts = [part for name, module in named for part in maker.module(name, module)]
    if method is not None and method.base == "required" and maker.lacks_base:
        problems.add(("base_model",), f"is required by {method.name!r}; name the model that the others were tuned from")
    return parts


class _Maker:
    def __init__(self, recipe: Recipe, method: Method | None, sources: Sources, problems: Problems) -> None:
        self._recipe = recipe
        self._method = method
        self._sources = sources
        self._problems = problems
        self._kind = method.base if method is not None else "optional"
        self.lacks_base = False

    def module(self, name: str | None, module: ModuleEntry) -> list[Part]:
        path: Place = () if name is None else ("modules", name)
        levels = (((*path, "parameters"), module.parameters), (("parameters",), self._recipe.parameters))[name is None :]
        if module.models:
            return [self._part((*path, "models"), module.models, None, levels, name, None)]
        parts, start = [], 0
        for i, piece in enumerate(module.slices):
            cut = Cut(start, piece.layers, i == 0, i == len(module.slices) - 1)
            parts.append(self._slice((*path, "slices", i), piece, levels, name, cut))
            start += piece.layers
        return parts

    def _slice(self, path: Place, piece: SliceEntry, levels: tuple, module: str | None, cut: Cut) -> Part:
        own = ((*path, "parameters"), piece.parameters)
        return self._part((*path, "sources"), piece.sources, piece.base_model, (own, *levels), module, cut)

    def _part(
        self,
        place: Place,
        entries: Sequence[ModelEntry],
        own_base: ModelReference | None,
        levels: tuple,
        module: str | None,
        cut: Cut | None,
    ) -> Part:
        """A base that is also listed is the base alone where the method takes deltas from it, and one model at its place where the method
        merely averages; there, one that is not listed is added to whole models as the last."""
        base = own_base or self._recipe.base_model
        base_place: Place = (*place[:-1], "base_model") if own_base else ("base_model",)
        inputs = [
            Input(self._index(entry.model), str(entry.model), (*place, i, "model"), entry.parameters, entry.layer_range)
            for i, entry in enumerate(entries)
        ]
        self.lacks_base |= base is None
        is_base = [base is not None and self._same(base, entry.model) for entry in entries]
        unused: list[Place] = []
        has_base = self._kind != "model" and base is not None
        if has_base:
            found = Input(self._index(base), str(base), base_place, {})
            if cut is not None:
                listed = [x for x, same in zip(inputs, is_base, strict=True) if same]
                if not listed:
                    self._problems.add(
                        place, f"do not have the base model, {base}; list it with the layer_range that the others' deltas are from"
                    )
                found = Input(found.index, found.name, base_place, {}, listed[0].layers if listed else entries[0].layer_range)
            repeats = [same and x.layers == found.layers for x, same in zip(inputs, is_base, strict=True)]
            unused = [x.parameters_place for x, again in zip(inputs, repeats, strict=True) if again and x.parameters]
            inputs = [found] + [x for x, again in zip(inputs, repeats, strict=True) if not again]
        elif base is not None and not any(is_base) and cut is None:
            inputs.append(Input(self._index(base), str(base), base_place, {}))
        part = Part(place, tuple(inputs), has_base, tuple(unused), levels, module, cut)
        self._check_count(part)
        self._warn_repeated(part)
        return part

    def _index(self, reference: ModelReference) -> int | None:
        return self._sources.indices[reference]

    def _same(self, base: ModelReference, model: ModelReference) -> bool:
        first, second = self._index(base), self._index(model)
        return first == second if first is not None and second is not None else base == model

    def _check_count(self, part: Part) -> None:
        method, count = self._method, len(part.models)
        if method is None or method.min_models <= count <= method.max_models:
            return
        besides = " besides the base" if part.has_base else ""
        if method.min_models == method.max_models:
            wanted = f"exactly {method.min_models}"
        else:
            wanted = f"at least {method.min_models}" if count < method.min_models else f"at most {method.max_models}"
        plural = "" if wanted.endswith(" 1") else "s"
        self._problems.add(part.place, f"{method.name!r} takes {wanted} model{plural}{besides}; {count} given")

    def _warn_repeated(self, part: Part) -> None:
        seen: dict[tuple, Input] = {}
        for one in part.models:
            key = (one.index, one.layers)
            if one.index is not None and key in seen and one.place[-1] == "model":
                first = seen[key].place[-3:-1]
                self._problems.warn(one.place, f"is the same checkpoint as {first[0]}[{first[1]}] and counts twice")
            seen.setdefault(key, one)
