"""One vocabulary for models that have different ones: the part of planning that `tokenizer_source` and `tokenizer:` ask for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..recipe.problems import Path as Place
from ..recipe.problems import Problems
from ..recipe.tokenizer import TokenizerSpec, TokenSpec
from ..tokenizer.config import with_special_ids, with_vocab_size
from ..tokenizer.extending import PLAIN, extend, matches_ordinary, union
from ..tokenizer.reading import TOKENIZER_FILES, Tokenizer, read_tokenizer
from ..tokenizer.rows import Override, ids_in_models, rows_of_models
from .extras import read_config, read_small
from .format import CheckpointError, load_json
from .store import TensorStore
from .vocabulary import ReorderedTensor, VocabularyStore
from .vocabulary_tensors import find_vocabulary_tensors, vocab_size_of

__all__ = ["Alignment", "align_vocabularies", "resize_vocabularies"]

CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Alignment:
    """Models with one vocabulary.

    Attributes:
        stores: to read from instead of the ones given, in their order; a store that needs no change is itself.
        vocab_size: rows of every embedding and head.
        files: of the output, by name: the tokenizer, config.json and generation_config.json.
        dropped: names of files that must not be copied from the donor of the output's other files: those of its own tokenizer.
    """

    stores: tuple[TensorStore, ...]
    vocab_size: int
    files: dict[str, bytes]
    dropped: tuple[str, ...]

    def replace(self, content: Mapping[str, bytes]) -> dict[str, bytes]:
        """The output's files made of those that would be copied from its donor."""
        kept = {name: raw for name, raw in content.items() if name not in self.dropped and not (self.dropped and name.endswith(".tiktoken"))}
        return {**kept, **self.files}


@dataclass
class _Model:
    """One model's side of the matter."""

    store: TensorStore
    name: str
    place: Place
    config: dict[str, Any] | None = None
    tensors: list[str] = field(default_factory=list)
    rows: int = 0
    tokenizer: Tokenizer | None = None


def align_vocabularies(
    spec: TokenizerSpec,
    stores: Sequence[TensorStore],
    names: Sequence[str],
    places: Sequence[Place],
    base: int | None,
    problems: Problems,
    *,
    references: Mapping[Hashable, int] | None = None,
    folders: Mapping[Hashable, Path] | None = None,
    place: Place = ("tokenizer",),
) -> Alignment | None:
    """Give all models of a merge the vocabulary that a recipe asks for. Reads tokenizers, config.json and no tensor.

    The output's rows are as many as its tokenizer has tokens, rounded up as `spec` says; rows that a model has beyond its tokenizer are cut.
    See :func:`pymerge.tokenizer.rows.rows_of_models` for where a row comes from and :mod:`pymerge.tokenizer.extending` for the union.

    Args:
        spec: what the recipe says.
        stores: the models, each once.
        names: what to call them in messages.
        places: where in the recipe they stand.
        base: index of the base model; without one the first model's tokenizer is the one that others' tokens are added to.
        problems: gets what is wrong, and warnings.
        references: how `spec` may call the models -> index into `stores`; by default `names`.
        folders: of models that are not merged, of which `spec` names only the tokenizer.
        place: of `spec` in the recipe.

    Returns:
        None when there are problems.
    """
    models = _open(stores, names, places, spec.tensors, problems)
    if models is None or not _read_tokenizers(models, base or 0, problems):
        return None
    references = references if references is not None else {name: i for i, name in reversed(list(enumerate(names)))}
    chosen = _choose(spec, models, base or 0, references, folders or {}, problems, place)
    if chosen is None:
        return None
    source, tokenizer = chosen
    overrides = _overrides(spec, models, references, tokenizer, problems, place)
    if overrides is None:
        return None
    size = tokenizer.size
    if spec.pad_to_multiple_of:
        size += -size % spec.pad_to_multiple_of
    ids = ids_in_models(tokenizer.ids, [(model.tokenizer.ids, model.rows) for model in models])
    used = torch.zeros(tokenizer.size, dtype=torch.bool)
    used[torch.tensor(list(tokenizer.ids.values()))] = True
    _warn(models, ids, used, overrides, tokenizer, size, spec, problems, place)
    aligned = _reordered(models, ids, base, overrides, used, size, problems, place)
    if aligned is None:
        return None
    files = _configs(models[base or 0], size, source if source is not models[base or 0].tokenizer else None, tokenizer, problems, place)
    return Alignment(aligned, size, {**tokenizer.contents, **files}, TOKENIZER_FILES)


def resize_vocabularies(
    policy: Literal["truncate", "pad"],
    stores: Sequence[TensorStore],
    names: Sequence[str],
    places: Sequence[Place],
    base: int | None,
    problems: Problems,
    *,
    tensors: Sequence[str] = (),
) -> Alignment | None:
    """Give all models the same number of rows without a look at their tokenizers: row i is row i of every model.

    Args:
        policy: "truncate": all have as many rows as the smallest; "pad": as the largest, where the rows that a model lacks are filled as
            :func:`pymerge.tokenizer.rows.rows_of_models` says (those of the only model that has them, the base's, or the mean).
        tensors: names of the tensors with one row per token, where they cannot be known.

    Other arguments and the result: as :func:`align_vocabularies`; the tokenizer's files are not touched.
    """
    models = _open(stores, names, places, tensors, problems)
    if models is None:
        return None
    size = (min if policy == "truncate" else max)(model.rows for model in models)
    every = torch.arange(size)
    ids = torch.stack([torch.where(every < model.rows, every, -1) for model in models])
    aligned = _reordered(models, ids, base, {}, torch.ones(size, dtype=torch.bool), size, problems, ())
    return None if aligned is None else Alignment(aligned, size, _configs(models[base or 0], size, None, None, problems, ()), ())


def _open(stores, names, places, tensors: Sequence[str], problems: Problems) -> list[_Model] | None:
    models = [_Model(*parts) for parts in zip(stores, names, places, strict=True)]
    before = len(problems.found())
    for model in models:
        try:
            model.config = read_config(model.store.folder)
            model.tensors = find_vocabulary_tensors(model.store.tensors, vocab_size_of(model.config), tensors)
            model.rows = model.store.tensors[model.tensors[0]].shape[0]
        except CheckpointError as error:
            problems.add(model.place, f"{model.name}: {error}")
    return models if len(problems.found()) == before else None


def _read_tokenizers(models: list[_Model], first: int, problems: Problems) -> bool:
    known: dict[tuple, Tokenizer] = {}
    good = True
    for model in models:
        try:
            model.tokenizer = read_tokenizer(model.store.folder, known) if model.store.folder is not None else None
        except CheckpointError as error:
            problems.add(model.place, str(error))
            good = False
    if not good:
        return False
    for model in models:
        if model.tokenizer is None:
            default = models[first]
            if default.tokenizer is not None and default.rows == model.rows:
                problems.warn(model.place, f"{model.name} has no tokenizer; that of {default.name}, which has as many rows, is taken for it")
                model.tokenizer = default.tokenizer
            else:
                problems.add(model.place, f"{model.name} has no tokenizer (tokenizer.json), so nobody knows the tokens of its {model.rows} rows")
                good = False
    return good


def _choose(
    spec: TokenizerSpec,
    models: list[_Model],
    first: int,
    references: Mapping[Hashable, int],
    folders: Mapping[Hashable, Path],
    problems: Problems,
    place: Place,
) -> tuple[Tokenizer, Tokenizer] | None:
    """(the tokenizer whose files are taken, the one of the output, which may have more tokens)."""
    try:
        if spec.source in ("union", "base"):
            source = models[first].tokenizer
        elif spec.source in references:
            source = models[references[spec.source]].tokenizer
        elif spec.source in folders:
            source = read_tokenizer(folders[spec.source])
        else:
            source = None
        if source is None:
            problems.add(place, f"there is no tokenizer for {spec.source!r}; write union, base or a model with a tokenizer")
            return None
        others = [(model.tokenizer, model.rows) for model in models] if spec.source == "union" else []
        new = union(source, others)
        ordinary = sum(flags is None for flags in new.values())
        if ordinary and matches_ordinary(source):
            problems.warn(
                place,
                f"{ordinary} ordinary tokens of other models are added to a vocabulary in which words are looked up: words that they spell "
                f"are encoded as them from now on, unlike in {source.folder}",
            )
        new |= {token: PLAIN for token in spec.tokens if token not in source.ids and token not in new}
        return source, extend(source, new)
    except CheckpointError as error:
        problems.add(place, str(error))
        return None


def _overrides(
    spec: TokenizerSpec, models: list[_Model], references: Mapping[Hashable, int], tokenizer: Tokenizer, problems: Problems, place: Place
) -> dict[int, Override] | None:
    result, good = {}, True
    for token, said in spec.tokens.items():
        try:
            result[tokenizer.ids[token]] = _override(token, said, models, references)
        except ValueError as error:
            problems.add((*place, "tokens", token), str(error))
            good = False
    return result if good else None


def _override(token: str, said: TokenSpec, models: list[_Model], references: Mapping[Hashable, int]) -> Override:
    if said.kind == "zero":
        return Override("zero", force=said.force)
    if said.model not in references:
        raise ValueError(f"{said.model!r} is not a model of this merge; its embedding would not be read")
    index = references[said.model]
    model = models[index]
    if said.kind == "token" and said.token_id is not None:
        if not 0 <= said.token_id < model.rows:
            raise ValueError(f"token_id is {said.token_id}, but {model.name} has the rows 0 to {model.rows - 1}")
        return Override("row", index, said.token_id, said.force)
    wanted = said.token if said.kind == "token" else token
    row = model.tokenizer.ids.get(wanted)
    if row is None:
        raise ValueError(f"{model.name} has no token {wanted!r}; take it from a model that has it, name another token, or {{kind: zero}}")
    if row >= model.rows:
        raise ValueError(f"{model.name} has the token {wanted!r}, but no row for its id {row}: its embedding has {model.rows} rows")
    return Override("row", index, row, said.force)


def _warn(
    models: list[_Model],
    ids: Tensor,
    used: Tensor,
    overrides: Mapping[int, Override],
    tokenizer: Tokenizer,
    size: int,
    spec: TokenizerSpec,
    problems: Problems,
    place: Place,
) -> None:
    nowhere = used & ~(ids >= 0).any(0)
    nowhere[torch.tensor(list(overrides), dtype=torch.int64)] = False
    if nowhere.any():
        number = int(nowhere.int().argmax())
        token = next(token for token, i in tokenizer.ids.items() if i == number)
        problems.warn(place, f"{int(nowhere.sum())} tokens have no row in any model and get zeros, the first: {token!r} ({number})")
    for model in models:
        if model.rows > max(model.tokenizer.size, size):
            problems.warn(
                model.place,
                f"{model.name} has {model.rows} rows for {model.tokenizer.size} tokens; the output has {size}"
                + ("" if spec.pad_to_multiple_of else " (pad_to_multiple_of rounds that up)"),
            )


def _reordered(
    models: list[_Model],
    ids: Tensor,
    base: int | None,
    overrides: Mapping[int, Override],
    used: Tensor,
    size: int,
    problems: Problems,
    place: Place,
) -> tuple[TensorStore, ...] | None:
    """A store for each model, all with `size` rows."""
    changed: list[dict[str, ReorderedTensor]] = [{} for _ in models]
    rows_of: Callable = _Resolved(ids, base, overrides, used, size)
    good = True
    for name in dict.fromkeys(name for model in models for name in model.tensors):
        # A model may lack one of them: a head that is tied to the embedding, in one of the models only, is not there to take rows from.
        having = [i for i, model in enumerate(models) if name in model.tensors]
        sources = [(models[i].store, models[i].store.tensors[name]) for i in having]
        beyond = {info.shape[1:]: models[i] for (_, info), i in zip(sources, having, strict=True)}
        if len(beyond) > 1:
            said = " and ".join(f"{list(shape)} in {model.name}" for shape, model in beyond.items())
            problems.add(next(iter(reversed(beyond.values()))).place, f"{name!r} has rows of shape {said}; they cannot be mixed")
            good = False
            continue
        absent = [override.model for override in overrides.values() if override.kind == "row" and override.model not in having]
        if absent:
            problems.add((*place, "tokens"), f"{models[absent[0]].name} is to give rows, but has no {name!r}")
            good = False
            continue
        for position, (i, rows) in enumerate(zip(having, rows_of(tuple(having)), strict=True)):
            info = sources[position][1]
            if info.shape[0] != size or not ((rows.source == position).all() and torch.equal(rows.row, torch.arange(size))):
                changed[i][name] = ReorderedTensor(name, sources, position, rows)
    if not good:
        return None
    return tuple(VocabularyStore(model.store, tensors) if tensors else model.store for model, tensors in zip(models, changed, strict=True))


class _Resolved:
    """Rows by the models that have a tensor, so that embeddings and heads share them."""

    def __init__(self, ids: Tensor, base: int | None, overrides: Mapping[int, Override], used: Tensor, size: int) -> None:
        self._ids, self._base, self._overrides, self._used, self._size = ids, base, overrides, used, size
        self._known: dict[tuple[int, ...], list] = {}

    def __call__(self, having: tuple[int, ...]) -> list:
        if having not in self._known:
            renamed = {
                token: Override(o.kind, having.index(o.model) if o.kind == "row" else -1, o.row, o.force)
                for token, o in self._overrides.items()
            }
            base = having.index(self._base) if self._base in having else None
            self._known[having] = rows_of_models(self._ids[list(having)], base, renamed, self._used, self._size)
        return self._known[having]


def _configs(
    donor: _Model, size: int, source: Tokenizer | None, tokenizer: Tokenizer | None, problems: Problems, place: Place
) -> dict[str, bytes]:
    """The donor's configs with the new size and, when the tokenizer is taken from elsewhere (`source`), its special tokens."""
    folder = donor.store.folder
    files = {name: read_small(folder / name) for name in CONFIGS if folder is not None and (folder / name).is_file()}
    if source is not None and tokenizer is not None and donor.tokenizer is not None:
        texts = {number: token for token, number in donor.tokenizer.ids.items()}
        for name, raw in files.items():
            path = source.folder / name
            theirs = load_json(read_small(path), str(path)) if path.is_file() else {}
            files[name], lost = with_special_ids(raw, theirs, lambda number: tokenizer.ids.get(texts.get(number, "")))
            if lost:
                problems.warn(place, f"{name}: {', '.join(lost)} of {donor.name} has no counterpart in the tokenizer of {source.folder}; now null")
    if "config.json" in files and size != donor.rows:
        files["config.json"] = with_vocab_size(files["config.json"], donor.rows, size)
    return files
