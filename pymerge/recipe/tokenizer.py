"""Which tokenizer the output gets, and where the embeddings of its tokens come from, as a recipe says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .problems import Path, Problems, did_you_mean
from .reference import ModelReference, parse_reference

__all__ = ["TokenSpec", "TokenizerSpec", "parse_tokenizer", "parse_tokenizer_source"]


@dataclass(frozen=True)
class TokenSpec:
    """Where the embedding of one token comes from.

    Attributes:
        kind: ``"model"``: the same token in `model`, or by the rule for all tokens when `model` is None; ``"zero"``: zeros;
            ``"token"``: another token of `model`, named by `token` or `token_id`.
        model: the model meant.
        token, token_id: the other token; exactly one is set for kind ``"token"``.
        force: every model gets this embedding, and not only those that lack the token.
    """

    kind: Literal["model", "zero", "token"]
    model: ModelReference | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """The output's tokenizer.

    Attributes:
        source: ``"union"``, ``"base"``, or a model as the recipe writes it, which is then `model` too.
        tokens: token -> where its embedding comes from; tokens that the source's vocabulary lacks are added to it.
        pad_to_multiple_of: of the number of rows of the embeddings.
        model: the model that `source` names.
        tensors: names of the tensors with one row per token, where they cannot be told.
    """

    source: str
    tokens: Mapping[str, TokenSpec] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    model: ModelReference | None = None
    tensors: tuple[str, ...] = ()

    def references(self) -> list[ModelReference]:
        """Every model that it names."""
        named = [self.model, *(spec.model for spec in self.tokens.values())]
        return [reference for reference in named if reference is not None]

    def to_value(self) -> dict[str, Any]:
        """What a recipe writes under ``tokenizer``."""
        value: dict[str, Any] = {"source": self.model.to_value() if self.model else self.source}
        if self.tokens:
            value["tokens"] = {token: _token_value(spec) for token, spec in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            value["pad_to_multiple_of"] = self.pad_to_multiple_of
        if self.tensors:
            value["tensors"] = list(self.tensors)
        return value


def _token_value(spec: TokenSpec) -> dict[str, Any]:
    value: dict[str, Any] = {}
    if spec.kind == "zero":
        value["source"] = {"kind": "zero"}
    elif spec.model is not None:
        model = spec.model.to_value()
        if spec.kind == "token":
            other = {"token": spec.token} if spec.token is not None else {"token_id": spec.token_id}
            value["source"] = {"kind": "model_token", "model": model, **other}
        else:
            value["source"] = model
    return {**value, "force": True} if spec.force else value


def parse_tokenizer_source(value: Any, path: Path, problems: Problems) -> TokenizerSpec | None:
    """``tokenizer_source``: "union", "base" or a model."""
    if value in ("union", "base"):
        return TokenizerSpec(value)
    model = parse_reference(value, path, problems)
    return TokenizerSpec(str(model), model=model) if model is not None else None


def parse_tokenizer(value: Any, path: Path, problems: Problems) -> TokenizerSpec | None:
    """``tokenizer``: source, tokens, pad_to_multiple_of, and our own tensors."""
    if not isinstance(value, Mapping):
        problems.add(path, "is not a mapping; write source, tokens and pad_to_multiple_of below it")
        return None
    _unknown(value, ("source", "tokens", "pad_to_multiple_of", "tensors"), path, problems)
    source = parse_tokenizer_source(value.get("source", "union"), (*path, "source"), problems)
    given = value.get("tokens") or {}
    tokens: dict[str, TokenSpec] = {}
    if not isinstance(given, Mapping):
        problems.add((*path, "tokens"), "is not a mapping; write each token with its source below it")
        given = {}
    for token, spec in given.items():
        parsed = _token(spec, (*path, "tokens", token), problems)
        if not isinstance(token, str) or not token:
            problems.add((*path, "tokens", token), f"{token!r} is not a token; write text, in quotes")
        elif parsed is not None:
            tokens[token] = parsed
    multiple = value.get("pad_to_multiple_of")
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        problems.add((*path, "pad_to_multiple_of"), f"is {multiple!r}; write a whole number of at least 1")
        multiple = None
    tensors = value.get("tensors") or []
    if not isinstance(tensors, list | tuple) or not all(isinstance(name, str) for name in tensors):
        problems.add((*path, "tensors"), f"is {tensors!r}; write a list of the names of the tensors with one row per token")
        tensors = []
    return None if source is None else TokenizerSpec(source.source, tokens, multiple, source.model, tuple(tensors))


def _token(value: Any, path: Path, problems: Problems) -> TokenSpec | None:
    if not isinstance(value, Mapping):
        problems.add(path, "is not a mapping; write 'source' (a model, or a mapping with a kind) and 'force' below the token")
        return None
    _unknown(value, ("source", "force"), path, problems)
    force = value.get("force", False)
    if not isinstance(force, bool):
        problems.add((*path, "force"), f"is {force!r}; write true or false")
        return None
    source, place = value.get("source"), (*path, "source")
    if source is None:
        return TokenSpec("model", force=force)
    if not isinstance(source, Mapping) or "kind" not in source:
        model = parse_reference(source, place, problems)
        return TokenSpec("model", model, force=force) if model is not None else None
    if source["kind"] == "zero":
        _unknown(source, ("kind",), place, problems)
        return TokenSpec("zero", force=force)
    if source["kind"] != "model_token":
        problems.add((*place, "kind"), f"is {source['kind']!r}; choose model_token or zero, or write a model in place of the mapping")
        return None
    return _other_token(source, force, place, problems)


def _other_token(source: Mapping, force: bool, path: Path, problems: Problems) -> TokenSpec | None:
    _unknown(source, ("kind", "model", "token", "token_id"), path, problems)
    model = parse_reference(source.get("model"), (*path, "model"), problems)
    token, token_id = source.get("token"), source.get("token_id")
    if (token is None) == (token_id is None):
        problems.add(path, "needs either 'token' or 'token_id'")
        return None
    if token is not None and not isinstance(token, str):
        problems.add((*path, "token"), f"is {token!r}; write text, in quotes")
        return None
    if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0):
        problems.add((*path, "token_id"), f"is {token_id!r}; write a whole number, from 0")
        return None
    return TokenSpec("token", model, token, token_id, force) if model is not None else None


def _unknown(value: Mapping, keys: tuple[str, ...], path: Path, problems: Problems) -> None:
    for key in value:
        if key not in keys:
            problems.add((*path, key), f"unknown key{did_you_mean(key, keys) or '; there are ' + ', '.join(keys)}")
