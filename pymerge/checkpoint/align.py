"""One vocabulary for models that have different ones: the part of planning that `tokenizer_source` and `tokenizer:` ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..recipe.problems import Path as Place
from ..recipe.problems import Problems
from ..recipe.reference import ModelReference
from ..recipe.tokenizer import TokenizerSpec, TokenSpec
from ..tokenizer.config import set_special_ids, set_vocab_size
from ..tokenizer.extending import PLAIN, extend, union
from ..tokenizer.reading import MAX_ID, TOKENIZER_FILES, Tokenizer, read_tokenizer
from ..tokenizer.rows import Override, ids_in_models, rows_of_models
from .extras import read_json, to_json
from .format import CheckpointError, TensorInfo
from .sources import Sources
from .store import TensorStore
from .vocabulary import ReorderedTensor, VocabularyStore
from .vocabulary_tensors import find_vocabulary_tensors, vocab_size_of

__all__ = ["Alignment", "align_vocabularies", "pad_vocabularies"]

CONFIGS = ("config.json", "generation_config.json")

Aliases = Mapping[int, Mapping[str, str]]
"""Index of a checkpoint -> a head that it does not store -> the embedding that it is tied to."""


@dataclass(frozen=True)
class Alignment:
    """Models with one vocabulary.

    Attributes:
        stores: to read from instead of the checkpoints, in their order; one that needs no change is itself.
        vocab_size: rows of every embedding and head.
        files: of the output, by name: the tokenizer, config.json and generation_config.json.
        dropped: names of files that must not be copied from the donor of the output's other files: those of its own tokenizer.
    """

    stores: tuple[TensorStore, ...]
    vocab_size: int
    files: dict[str, bytes]
    dropped: tuple[str, ...] = ()

    def replace(self, content: Mapping[str, bytes]) -> dict[str, bytes]:
        """The output's files, from those that would be copied from the donor."""
        kept = {
            name: raw for name, raw in content.items() if name not in self.dropped and not (self.dropped and name.endswith(".tiktoken"))
        }
        return {**kept, **self.files}


@dataclass
class _Model:
    """One checkpoint's side of the matter.

    Attributes:
        infos: its tensors with one row per token, by the names that they have in the output.
        merged: whether it is an input of the merge, or only named for its tokenizer or for rows of single tokens.
    """

    store: TensorStore
    name: str
    place: Place
    merged: bool
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    @property
    def rows(self) -> int:
        """Of each of them."""
        return next(iter(self.infos.values())).shape[0] if self.infos else 0


def align_vocabularies(
    spec: TokenizerSpec,
    sources: Sources,
    merged: Collection[int],
    base: int | None,
    aliases: Aliases,
    problems: Problems,
    place: Place = ("tokenizer",),
) -> Alignment | None:
    """Give all models of a merge the vocabulary that a recipe asks for. Reads tokenizers, configs and no tensor.

    The output has as many rows as its tokenizer has tokens, rounded up as `spec` says; rows that a model has beyond its tokenizer are cut.
    See :func:`pymerge.tokenizer.rows.rows_of_models` for where a row comes from and :mod:`pymerge.tokenizer.extending` for the union.

    Args:
        spec: what the recipe says.
        sources: the checkpoints, all of which could be opened.
        merged: indices of those that are inputs of the merge.
        base: index of the base model, whose rows go before others'. Without one, the donor's tokenizer is the base of the union.
        aliases: tied heads that stand beside untied ones.
        problems: gets what is wrong, and warnings.
        place: of `spec` in the recipe.

    Returns:
        None when there are problems.
    """
    models = _open(sources, merged, aliases, spec, problems, place)
    if models is None or not _read_tokenizers(models, sources.donor, problems):
        return None
    donor = models[sources.donor]
    chosen = _choose(spec, models, donor, sources.indices, problems, place)
    if chosen is None:
        return None
    source, tokenizer = chosen
    overrides = _overrides(spec, models, sources.indices, tokenizer, problems, place)
    if overrides is None:
        return None
    size = tokenizer.size
    if spec.pad_to_multiple_of:
        size += -size % spec.pad_to_multiple_of
    if size > MAX_ID:
        problems.add((*place, "pad_to_multiple_of"), f"makes {size} rows of {tokenizer.size}; more than {MAX_ID} are surely a mistake")
        return None
    ids = ids_in_models(tokenizer.ids, [(m.tokenizer.ids if m.tokenizer and m.merged else {}, m.rows) for m in models])
    used = torch.zeros(tokenizer.size, dtype=torch.bool)
    used[torch.tensor(list(tokenizer.ids.values()))] = True
    _warn(models, ids, used, overrides, tokenizer, size, spec, problems, place)
    stores = _reordered(models, ids, base, overrides, used, size, problems, place)
    if stores is None:
        return None
    files = _configs(donor, size, source if source is not donor.tokenizer else None, tokenizer, problems, place)
    return Alignment(stores, size, {**tokenizer.contents, **files}, TOKENIZER_FILES)


def pad_vocabularies(sources: Sources, merged: Collection[int], base: int | None, aliases: Aliases, problems: Problems) -> Alignment | None:
    """Give all models the number of rows of the largest, without a look at their tokenizers: row i is row i of every model.

    The rows that a model lacks are filled as :func:`pymerge.tokenizer.rows.rows_of_models` says: those of the only model that has them, the
    base's, or the mean. Arguments and result as :func:`align_vocabularies` has them; the tokenizer stays the donor's.
    """
    models = _open(sources, merged, aliases, None, problems, ())
    if models is None:
        return None
    size = max(model.rows for model in models if model.merged)
    every = torch.arange(size)
    ids = torch.stack([torch.where((every < model.rows) & model.merged, every, -1) for model in models])
    stores = _reordered(models, ids, base, {}, torch.ones(size, dtype=torch.bool), size, problems, ())
    return None if stores is None else Alignment(stores, size, _configs(models[sources.donor], size, None, None, problems, ()))


def _open(
    sources: Sources, merged: Collection[int], aliases: Aliases, spec: TokenizerSpec | None, problems: Problems, place: Place
) -> list[_Model] | None:
    parts = zip(sources.checkpoints, sources.names, sources.places, strict=True)
    models = [_Model(*part, merged=i in merged) for i, part in enumerate(parts)]
    giving = {sources.indices[token.model] for token in spec.tokens.values() if token.model is not None} if spec else set()
    good = True
    for i, model in enumerate(models):
        if not model.merged and i not in giving:
            continue
        try:
            tensors = model.store.tensors
            found = find_vocabulary_tensors(tensors, vocab_size_of(sources.configs[i]), spec.tensors if spec else ())
            tied = {head: embedding for head, embedding in aliases.get(i, {}).items() if embedding in found}
            model.infos = {name: tensors[name] for name in found} | {head: tensors[embedding] for head, embedding in tied.items()}
        except CheckpointError as error:
            problems.add(model.place, f"{model.name}: {error}")
            good = False
    if good and not any(model.infos for model in models if model.merged):
        problems.add(place, "no model has a tensor that is known to be an embedding")
        good = False
    return models if good else None


def _read_tokenizers(models: list[_Model], donor: int, problems: Problems) -> bool:
    known: dict[tuple, Tokenizer] = {}
    good = True
    for model in models:
        try:
            model.tokenizer = read_tokenizer(model.store.folder, known) if model.store.folder is not None else None
        except CheckpointError as error:
            problems.add(model.place, str(error))
            good = False
    for model in models if good else ():
        if model.tokenizer is None and model.infos:
            default = models[donor]
            if default.tokenizer is not None and default.rows == model.rows:
                problems.warn(
                    model.place, f"{model.name} has no tokenizer; that of {default.name}, which has as many rows, is taken for it"
                )
                model.tokenizer = default.tokenizer
            else:
                problems.add(model.place, f"{model.name} has no tokenizer (tokenizer.json) to say what its {model.rows} rows stand for")
                good = False
    return good


def _choose(
    spec: TokenizerSpec, models: list[_Model], donor: _Model, indices: Mapping[ModelReference, int | None], problems: Problems, place: Place
) -> tuple[Tokenizer, Tokenizer] | None:
    """(the tokenizer whose files are taken, the one of the output, which may have more tokens)."""
    model = models[indices[spec.model]] if spec.model is not None else donor
    source = model.tokenizer
    if source is None:
        problems.add(place, f"{model.name} has no tokenizer; write union, base or a model that has one")
        return None
    others = [(m.tokenizer, m.rows) for m in models if m.tokenizer and m.merged] if spec.source == "union" and spec.model is None else []
    new = union(source, others)
    ordinary = sum(flags is None for flags in new.values())
    try:
        if ordinary and source.looks_up:
            problems.warn(
                place,
                f"{ordinary} ordinary tokens of other models are added to a vocabulary in which words are looked up: words that they spell "
                f"are encoded as them from now on, unlike by {model.name}",
            )
        new |= {token: PLAIN for token in spec.tokens if token not in source.ids and token not in new}
        return source, extend(source, new)
    except CheckpointError as error:
        problems.add(place, str(error))
        return None


def _overrides(
    spec: TokenizerSpec,
    models: list[_Model],
    indices: Mapping[ModelReference, int | None],
    tokenizer: Tokenizer,
    problems: Problems,
    place: Place,
) -> dict[int, Override] | None:
    result, good = {}, True
    for token, said in spec.tokens.items():
        try:
            result[tokenizer.ids[token]] = _override(token, said, models, indices)
        except ValueError as error:
            problems.add((*place, "tokens", token), str(error))
            good = False
    return result if good else None


def _override(token: str, said: TokenSpec, models: list[_Model], indices: Mapping[ModelReference, int | None]) -> Override:
    if said.kind == "zero" or said.model is None:
        return Override("zero" if said.kind == "zero" else "rule", force=said.force)
    index = indices[said.model]
    model = models[index]
    if said.kind == "token" and said.token_id is not None:
        if not 0 <= said.token_id < model.rows:
            raise ValueError(f"token_id is {said.token_id}, but {model.name} has the rows 0 to {model.rows - 1}")
        return Override("row", index, said.token_id, said.force)
    wanted = said.token if said.kind == "token" else token
    row = model.tokenizer.ids.get(wanted) if model.tokenizer else None
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
    nowhere[torch.tensor([token for token, o in overrides.items() if o.kind != "rule"], dtype=torch.int64)] = False
    if nowhere.any():
        number = int(nowhere.int().argmax())
        token = next(token for token, i in tokenizer.ids.items() if i == number)
        problems.warn(place, f"{int(nowhere.sum())} tokens have no row in any model and get zeros, the first: {token!r} ({number})")
    for model in models:
        if model.merged and model.tokenizer and model.rows > max(model.tokenizer.size, size):
            rounds = "" if spec.pad_to_multiple_of else " (pad_to_multiple_of rounds that up)"
            problems.warn(
                model.place, f"{model.name} has {model.rows} rows for {model.tokenizer.size} tokens; the output has {size} rows{rounds}"
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
    """A store for each model, those of merged ones with `size` rows."""
    changed: list[dict[str, ReorderedTensor]] = [{} for _ in models]
    known: dict[tuple[int, ...], list] = {}
    good = True
    for name in dict.fromkeys(name for model in models if model.merged for name in model.infos):
        having = tuple(i for i, model in enumerate(models) if name in model.infos)
        sources = [(models[i].store, models[i].infos[name]) for i in having]
        beyond = {info.shape[1:]: models[i] for (_, info), i in zip(sources, having, strict=True)}
        if len(beyond) > 1:
            said = " and ".join(f"{list(shape)} in {model.name}" for shape, model in beyond.items())
            problems.add(list(beyond.values())[-1].place, f"{name!r} has rows of shape {said}; they cannot be mixed")
            good = False
            continue
        absent = [o.model for o in overrides.values() if o.kind == "row" and o.model not in having]
        if absent:
            problems.add((*place, "tokens"), f"{models[absent[0]].name} is to give rows, but has no {name!r}")
            good = False
            continue
        if having not in known:  # embeddings and heads share what they have in common
            known[having] = _rows_among(having, ids, base, overrides, used, size)
        for position, i in enumerate(having):
            rows, info = known[having][position], sources[position][1]
            same = info.shape[0] == size and (rows.source == position).all() and torch.equal(rows.row, torch.arange(size))
            if models[i].merged and not same:
                changed[i][name] = ReorderedTensor(name, sources, position, rows)
    if not good:
        return None
    read = [model.store.folder / name for model in models if model.tokenizer and model.store.folder for name in model.tokenizer.contents]
    files = [file for file in read if file.is_file()]  # a model may have the tokenizer of another
    return tuple(
        VocabularyStore(model.store, tensors, files) if tensors else model.store for model, tensors in zip(models, changed, strict=True)
    )


def _rows_among(having: Sequence[int], ids: Tensor, base: int | None, overrides: Mapping[int, Override], used: Tensor, size: int) -> list:
    """Rows with models counted among `having`: a model may lack a tensor that others have, and then gives no rows of it."""
    place = {model: i for i, model in enumerate(having)}
    counted = {token: replace(o, model=place.get(o.model, -1)) for token, o in overrides.items()}
    return rows_of_models(ids[list(having)], place.get(base), counted, used, size)


def _configs(
    donor: _Model, size: int, source: Tokenizer | None, tokenizer: Tokenizer | None, problems: Problems, place: Place
) -> dict[str, bytes]:
    """The donor's configs with the new size and, when the tokenizer is taken from elsewhere (`source`), its special tokens."""
    folder = donor.store.folder
    read = {name: read_json(folder / name) for name in CONFIGS} if folder is not None else {}
    configs = {name: config for name, config in read.items() if config is not None}
    if source is not None and tokenizer is not None and donor.tokenizer is not None:
        texts = {number: token for token, number in donor.tokenizer.ids.items()}
        for name, config in configs.items():
            theirs = read_json(source.folder / name) or {}
            lost = set_special_ids(config, theirs, lambda number: tokenizer.ids.get(texts.get(number, "")))
            if lost:
                problems.warn(
                    place, f"{name}: {', '.join(lost)} of {donor.name} is null now: the tokenizer that the output gets has no such token"
                )
    if "config.json" in configs and size != donor.rows:
        set_vocab_size(configs["config.json"], donor.rows, size)
    return {name: to_json(config) for name, config in configs.items()}
