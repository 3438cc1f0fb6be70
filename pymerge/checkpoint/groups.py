"""Tensors by layer and by kind, told from their names alone: no architecture is known here."""

from __future__ import annotations

import re

__all__ = ["in_order", "kind_of", "layer_of", "stack_of"]

_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")  # a whole part of a dotted name


def layer_of(name: str) -> str:
    """A name up to its first number ("model.layers.3"); without a number, up to its last part ("model.embed_tokens")."""
    found = _NUMBER.search(name)
    return name[: found.end()] if found else name.rpartition(".")[0] or name


def stack_of(name: str) -> tuple[str, int] | None:
    """("model.layers", 3) for a tensor of layer 3, None outside any stack of layers."""
    found = _NUMBER.search(name)
    return (name[: found.start()].rstrip("."), int(found.group())) if found else None


def kind_of(name: str) -> str:
    """A name with its numbers as stars: the same for the same tensor of every layer."""
    return _NUMBER.sub("*", name)


def in_order(name: str) -> tuple:
    """A key to sort names by: layer 10 after layer 9."""
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in name.split("."))
