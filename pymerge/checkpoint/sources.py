"""The checkpoints that a recipe names: found, opened, and put into the roles that the method has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..merge_methods.registry import Method
from ..recipe.locate import locate
from ..recipe.problems import Path as Place
from ..recipe.problems import Problems
from ..recipe.schema import Recipe
from .extras import read_config
from .format import CheckpointError
from .quantised import sign_of_quantisation
from .reader import Checkpoint, open_checkpoint

__all__ = ["Sources", "open_sources"]


@dataclass
class Sources:
    """Opened checkpoints and their roles.

    Attributes:
        checkpoints: each checkpoint once, however often it is named.
        inputs: indices into `checkpoints` of what every tensor is merged from: the base, if any, first.
        names: the inputs as the recipe writes them.
        places: where in the recipe each input stands.
        has_base: whether the first input is the base.
        merged: for each model besides the base: its place in ``recipe.models``, None for a base that was not listed.
        ignored: places in ``recipe.models`` that only repeat the base.
        donor: folder of the base or else of the first model.
        complete: whether all checkpoints could be opened.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    has_base: bool = False
    merged: list[int | None] = field(default_factory=list)
    ignored: list[int] = field(default_factory=list)
    donor: Path | None = None
    complete: bool = True


class _Opener:
    """Opens each checkpoint once."""

    def __init__(self, recipe: Recipe, sources: Sources, problems: Problems) -> None:
        self._folder = recipe.folder
        self._sources = sources
        self._problems = problems
        self._index: dict[Path, int | None] = {}

    def open(self, text: str, place: Place) -> int | None:
        path = locate(text, self._folder, place, self._problems) if text else None
        if path is None:
            self._sources.complete = False
            return None
        real = path.resolve()
        if real not in self._index:
            self._index[real] = self._open_new(path, place)
        if self._index[real] is None:
            self._sources.complete = False
        return self._index[real]

    def _open_new(self, path: Path, place: Place) -> int | None:
        try:
            checkpoint = open_checkpoint(path)
            config = read_config(checkpoint.folder)
        except CheckpointError as error:
            self._problems.add(place, str(error))
            return None
        sign = sign_of_quantisation(checkpoint, config)
        if sign:
            self._problems.add(place, f"{path} is quantised ({sign}); stored codes cannot be merged: dequantise it first")
        if not checkpoint.tensors:
            self._problems.add(place, f"{path} has no tensors")
        self._sources.checkpoints.append(checkpoint)
        return len(self._sources.checkpoints) - 1


def open_sources(recipe: Recipe, method: Method | None, problems: Problems) -> Sources:
    """Open what a recipe names; everything wrong goes to `problems`.

    A base that is also among the models is the base alone where the method takes deltas from it, and one model at its place where the
    method merely averages; a base that is not among them is then added as the last model.
    """
    sources = Sources()
    opener = _Opener(recipe, sources, problems)
    base = opener.open(recipe.base_model, ("base_model",)) if recipe.base_model else None
    models = [opener.open(entry.model, ("models", i, "model")) for i, entry in enumerate(recipe.models)]
    kind = method.base if method is not None else "optional"
    if kind == "required" and not recipe.base_model:
        problems.add(("base_model",), f"is required by {method.name!r}; name the model that the others were tuned from")

    is_base = [_same(base, index, recipe.base_model, entry.model) for index, entry in zip(models, recipe.models, strict=True)]
    sources.has_base = kind != "model" and bool(recipe.base_model)
    if sources.has_base:
        _add(sources, base, recipe.base_model, ("base_model",))
        sources.ignored = [i for i, same in enumerate(is_base) if same]
    for i, index in enumerate(models):
        if i not in sources.ignored:
            sources.merged.append(i)
            _add(sources, index, recipe.models[i].model, ("models", i, "model"))
    if kind == "model" and recipe.base_model and not any(is_base):
        sources.merged.append(None)
        _add(sources, base, recipe.base_model, ("base_model",))
    _check_count(sources, method, recipe, problems)
    _warn_repeated(sources, models, problems)
    donor = base if base is not None else next((index for index in models if index is not None), None)
    sources.donor = sources.checkpoints[donor].folder if donor is not None else None
    return sources


def _same(base: int | None, index: int | None, base_text: str | None, text: str) -> bool:
    return index == base if base is not None and index is not None else base_text is not None and base_text == text


def _add(sources: Sources, index: int | None, name: str | None, place: Place) -> None:
    if index is not None:
        sources.inputs.append(index)
        sources.names.append(name or "")
        sources.places.append(place)


def _check_count(sources: Sources, method: Method | None, recipe: Recipe, problems: Problems) -> None:
    if method is None or not recipe.models:
        return
    count, besides = len(sources.merged), " besides the base" if sources.has_base else ""
    if not method.min_models <= count <= method.max_models:
        if method.min_models == method.max_models:
            wanted = f"exactly {method.min_models}"
        else:
            wanted = f"at least {method.min_models}" if count < method.min_models else f"at most {method.max_models}"
        problems.add(("models",), f"{method.name!r} takes {wanted} model{'s' if not wanted.endswith(' 1') else ''}{besides}; {count} given")


def _warn_repeated(sources: Sources, models: Sequence[int | None], problems: Problems) -> None:
    seen: dict[int, int] = {}
    for i in sources.merged:
        if i is None or models[i] is None:
            continue
        if models[i] in seen:
            problems.warn(("models", i, "model"), f"is the same checkpoint as models[{seen[models[i]]}] and counts twice")
        seen.setdefault(models[i], i)
