"""config.json and generation_config.json for another vocabulary: its size, and the ids of special tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["set_special_ids", "set_vocab_size"]

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
"""Roles that every tokenizer fills with tokens of its own."""


def _parts(config: dict[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """A config and all configs in it (a multimodal model's text_config), each with its counterpart in the other one."""
    left: list[tuple[dict[str, Any], Mapping[str, Any]]] = [(config, other)]
    while left:
        part, theirs = left.pop()
        yield part, theirs
        for key, value in part.items():
            if isinstance(value, dict):
                inner = theirs.get(key)
                left.append((value, inner if isinstance(inner, Mapping) else {}))


def set_vocab_size(config: dict[str, Any], before: int, size: int) -> None:
    """Make ``vocab_size`` `size` wherever it was `before`."""
    for part, _ in _parts(config, {}):
        if part.get("vocab_size") == before:
            part["vocab_size"] = size


def set_special_ids(config: dict[str, Any], theirs: Mapping[str, Any], renumber: Callable[[int], int | None]) -> list[str]:
    """Make the keys ``*_token_id`` mean tokens of another tokenizer; the keys for which it has none, which become null.

    Args:
        config: to change.
        theirs: the same config of the model that the tokenizer is taken from: it says which tokens begin and end a text.
        renumber: the new id of a token, None when the new tokenizer lacks it.
    """
    lost = []
    for part, other in _parts(config, theirs):
        for key, value in part.items():
            if not key.endswith("_token_id") or value is None:
                continue
            if key in ROLES and key in other:
                part[key] = other[key]
                continue
            new = [renumber(number) if isinstance(number, int) else None for number in (value if isinstance(value, list) else [value])]
            if None in new:
                lost.append(key)
                part[key] = None
            else:
                part[key] = new if isinstance(value, list) else new[0]
    return lost
