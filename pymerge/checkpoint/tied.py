"""Heads that are the embeddings: written once where all models tie them, and found where only some do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..recipe.layers import find_layer
from .format import TensorInfo
from .sources import Sources

__all__ = ["Ties", "find_ties", "is_vocabulary"]

# The usual names: a head is told from any other matrix by nothing else.
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|vocab_projector|lm_head\.decoder|cls\.predictions\.decoder)\.weight$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight$")


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token, as far as its name tells."""
    weight = re.sub(r"\.bias$", ".weight", name)
    return not find_layer(name) and bool(_HEAD.search(weight) or _EMBEDDING.search(weight))


@dataclass(frozen=True)
class Ties:
    """What to do about tied heads.

    Attributes:
        hidden: heads that are tied in every model that stores them, which nothing needs to store.
        aliases: index of a checkpoint -> head -> the embeddings that it is, where others have the head untied.
        untied: whether the output has a head of its own although a model ties it.
        kept: names of models that store a hidden head, for a message.
    """

    hidden: frozenset[str] = frozenset()
    aliases: dict[int, dict[str, str]] = field(default_factory=dict)
    untied: bool = False
    kept: tuple[str, ...] = ()


def find_ties(sources: Sources) -> Ties:
    """Tied tensors of all checkpoints: told by config.json and the usual names, or by a file in which two names are one piece of memory."""
    hidden, kept = set(), []
    aliases: dict[int, dict[str, str]] = {}
    shared = [_shared(sources, i) for i in range(len(sources.checkpoints))]
    heads = dict.fromkeys(n for store in sources.checkpoints for n in store.tensors if _HEAD.search(n) and not find_layer(n))
    for head in heads | dict.fromkeys(n for names in shared for n in names):
        holders = [i for i, store in enumerate(sources.checkpoints) if head in store.tensors]
        tied = [head in shared[i] or (_says_tied(sources.configs[i]) is True and _embedding(sources, i, head)) for i in holders]
        if all(tied):
            hidden.add(head)
            kept += [sources.names[i] for i in holders if head not in shared[i]]
            continue
        for i in range(len(sources.checkpoints)):  # without a head and a word about it, a model is tied: that is transformers' default
            if i in holders or head not in heads or sources.configs[i] is None or _says_tied(sources.configs[i]) is False:
                continue
            embedding = _embedding(sources, i, head, sources.checkpoints[holders[0]].tensors[head])
            if embedding:
                aliases.setdefault(i, {})[head] = embedding
    return Ties(frozenset(hidden), aliases, bool(aliases), tuple(dict.fromkeys(kept)))


def _shared(sources: Sources, index: int) -> set[str]:
    """Names in a file that are another name's memory, and that whoever reads the config ties again."""
    store, config = sources.checkpoints[index], sources.configs[index]
    if config is None or _says_tied(config) is False:
        return set()
    pairs = getattr(store, "aliases", {}).items()
    return {first if _HEAD.search(first) and not _HEAD.search(name) else name for name, first in pairs}


def _says_tied(config: Mapping[str, Any] | None) -> bool | None:
    """What config.json says, None when it does not say."""
    for part in (config or {}, (config or {}).get("text_config") or {}):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None


def _embedding(sources: Sources, index: int, head: str, like: TensorInfo | None = None) -> str | None:
    """The one tensor of a checkpoint that the head can be tied to."""
    tensors = sources.checkpoints[index].tensors
    width = (like or tensors[head]).shape[1:]
    found = [
        n for n, info in tensors.items() if _EMBEDDING.search(n) and not find_layer(n) and len(info.shape) == 2 and info.shape[1:] == width
    ]
    if like is None:
        found = [n for n in found if tensors[n].shape == tensors[head].shape]
    return found[0] if len(found) == 1 else None
