"""What a recipe says about the vocabulary of the output: `tokenizer_source`, or `tokenizer:` with its choices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["TokenSpec", "TokenizerSpec"]


@dataclass(frozen=True)
class TokenSpec:
    """Where a token's embedding comes from in the models that lack it (with `force`: in all of them).

    Attributes:
        kind: "model": the same token of a model; "token": another token of a model; "zero": zeros.
        model: the model, as the recipe writes it; None for "zero".
        token: of that model, for "token".
        token_id: instead of `token`: the row itself.
        force: use it in the models that have the token too.
    """

    kind: Literal["model", "zero", "token"]
    model: Hashable | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """The vocabulary of the output.

    Attributes:
        source: "union", "base", or a model as the recipe writes it.
        tokens: what is to be done about single tokens; those that the tokenizer lacks are added to it.
        pad_to_multiple_of: of which the number of rows is to be a multiple.
        tensors: names of the tensors with one row per token, where they cannot be known.
    """

    source: Hashable = "union"
    tokens: Mapping[str, TokenSpec] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    tensors: tuple[str, ...] = ()
