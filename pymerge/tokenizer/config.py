"""config.json and generation_config.json for another vocabulary: its size, and the ids of special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["with_special_ids", "with_vocab_size"]

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
"""Roles that every tokenizer fills with tokens of its own."""


def with_vocab_size(raw: bytes, before: int | None, size: int) -> bytes:
    """A config.json whose ``vocab_size`` is `size` wherever it was `before`; a multimodal model has it in a part of its own."""
    config = json.loads(raw)

    def change(part: dict[str, Any]) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                change(value)
            elif key == "vocab_size" and value == before:
                part[key] = size

    change(config)
    return _dump(config)


def with_special_ids(raw: bytes, tokenizers: Mapping[str, Any], renumber: Callable[[int], int | None]) -> tuple[bytes, list[str]]:
    """A config whose keys ``*_token_id`` mean tokens of another tokenizer; (the config, the keys for which there is none: they are null).

    Args:
        raw: the config.
        tokenizers: the same config of the model that the tokenizer is taken from: it says which tokens begin and end a text.
        renumber: the new id of a token, None when the new tokenizer lacks it.
    """
    config, lost = json.loads(raw), []

    def change(part: dict[str, Any], theirs: Mapping[str, Any]) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                inner = theirs.get(key)
                change(value, inner if isinstance(inner, Mapping) else {})
            elif key in ROLES and key in theirs:
                part[key] = theirs[key]
            elif key.endswith("_token_id") and value is not None:
                many = value if isinstance(value, list) else [value]
                new = [renumber(number) if isinstance(number, int) else None for number in many]
                if None in new:
                    lost.append(key)
                    part[key] = None
                else:
                    part[key] = new if isinstance(value, list) else new[0]

    change(config, tokenizers)
    return _dump(config), lost


def _dump(config: Any) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
