"""A tokenizer with more tokens, and the union of several.

The tokens of the first one keep their ids, the new ones follow. Tokens that another tokenizer *adds* to its vocabulary (control tokens, as
a rule) are added here too, with their flags, and found in text. Its *ordinary* tokens become part of the vocabulary, but the rules by which
text is cut stay those of the first tokenizer: as added tokens they would be found in the middle of words and change how every text is
encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..checkpoint.extras import to_json
from ..checkpoint.format import CheckpointError
from .reading import FLAGS, Tokenizer, load_object

__all__ = ["PLAIN", "extend", "union"]

PLAIN = {**FLAGS, "normalized": False}
"""Flags of a token that a recipe adds: found in text as it is written."""

UNLIKELY = 1e6
"""How much less probable than all others an ordinary token is made in a unigram vocabulary: cutting any word into others is better."""


def union(first: Tokenizer, others: Iterable[tuple[Tokenizer, int]]) -> dict[str, dict[str, bool] | None]:
    """What the others have and the first lacks: token -> flags if it is an added one, None for an ordinary one.

    In the order of the others and of their ids. A token without an embedding (an id beyond the number of rows given with its tokenizer)
    does not count.
    """
    new: dict[str, dict[str, bool] | None] = {}
    for other, rows in others:
        if other.ids == first.ids:
            continue
        for token, number in sorted(other.ids.items(), key=lambda item: item[1]):
            if token not in first.ids and number < rows and new.get(token) is None:
                new[token] = other.added.get(token)
    return new


def extend(tokenizer: Tokenizer, new: Mapping[str, dict[str, bool] | None]) -> Tokenizer:
    """The tokenizer with the tokens of `new` (see :func:`union`) behind its own.

    Raises:
        CheckpointError: its files cannot hold them.
    """
    if not new:
        return tokenizer
    ids = {**tokenizer.ids, **{token: tokenizer.size + i for i, token in enumerate(new)}}
    added = {**tokenizer.added, **{token: flags for token, flags in new.items() if flags is not None}}
    ordinary = any(flags is None for flags in new.values())
    contents = dict(tokenizer.contents)
    if "tokenizer.json" in contents:
        data = load_object(contents, "tokenizer.json", tokenizer.folder)
        _extend_tokenizer_json(data, ids, added, tokenizer)
        contents["tokenizer.json"] = _compact(data)
    if "vocab.json" in contents:
        contents["vocab.json"] = _compact({**load_object(contents, "vocab.json", tokenizer.folder), **ids})
    if "vocab.txt" in contents:
        contents["vocab.txt"] = _longer_list(contents["vocab.txt"], ids, tokenizer)
    if ordinary and "tokenizer.model" in contents:
        if tokenizer.kind == "tokenizer.model":
            count = sum(flags is None for flags in new.values())
            raise CheckpointError(
                f"{tokenizer.folder / 'tokenizer.model'}: {count} ordinary tokens cannot be appended to a SentencePiece model; save it as "
                f"tokenizer.json: AutoTokenizer.from_pretrained({str(tokenizer.folder)!r}).save_pretrained({str(tokenizer.folder)!r})"
            )
        del contents["tokenizer.model"]  # it would stand for a smaller vocabulary than tokenizer.json
    entries = sorted((ids[token], token) for token in added)
    if "tokenizer_config.json" in contents or tokenizer.kind != "tokenizer.json":
        config = load_object(contents, "tokenizer_config.json", tokenizer.folder)
        config["added_tokens_decoder"] = {str(number): {"content": token, **added[token]} for number, token in entries}
        contents["tokenizer_config.json"] = to_json(config)
    if "added_tokens.json" in contents or tokenizer.kind == "tokenizer.model":
        before = load_object(contents, "added_tokens.json", tokenizer.folder)
        contents["added_tokens.json"] = to_json({**before, **{token: ids[token] for token in new if token in added}})
    return replace(tokenizer, ids=ids, added=added, contents=contents)


def _extend_tokenizer_json(
    data: dict[str, Any], ids: Mapping[str, int], added: Mapping[str, dict[str, bool]], tokenizer: Tokenizer
) -> None:
    """All tokens into model.vocab: the tokenizers library numbers those that are not there by its own rule."""
    vocab = data["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab.update(ids)
    else:
        score = min((item[1] for item in vocab), default=0.0) - UNLIKELY
        vocab.extend([token, score] for token in _following(ids, len(vocab), "tokenizer.json", tokenizer))
    listed = {entry["content"]: entry for entry in data.get("added_tokens") or []}
    for token, flags in added.items():
        listed.setdefault(token, {"id": ids[token], "content": token, **flags})
    data["added_tokens"] = sorted(listed.values(), key=lambda entry: entry["id"])


def _following(ids: Mapping[str, int], begin: int, file: str, tokenizer: Tokenizer) -> list[str]:
    """The tokens from id `begin` on, in the order of ids, where a token's place in a list is its id."""
    by_id = {number: token for token, number in ids.items()}
    missing = [number for number in range(begin, max(by_id) + 1) if number not in by_id]
    if missing:
        raise CheckpointError(
            f"{tokenizer.folder / file}: no token has id {missing[0]}, and this kind of vocabulary is a list without gaps"
        )
    return [by_id[number] for number in range(begin, max(by_id) + 1)]


def _longer_list(raw: bytes, ids: Mapping[str, int], tokenizer: Tokenizer) -> bytes:
    lines = raw.decode().removesuffix("\n").split("\n")
    more = _following(ids, len(lines), "vocab.txt", tokenizer)
    broken = [token for token in more if "\n" in token]
    if broken:
        raise CheckpointError(f"{tokenizer.folder / 'vocab.txt'}: cannot hold the token {broken[0]!r}, which has a line break")
    return ("\n".join([*lines, *more]) + "\n").encode()


def _compact(data: Any) -> bytes:
    """JSON on one line: with indents, a vocabulary of usual size takes Python seconds."""
    return json.dumps(data, ensure_ascii=False).encode()
