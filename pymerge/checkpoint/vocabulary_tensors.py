"""Which tensors of a checkpoint have one row per token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import dtypes
from .format import CheckpointError, TensorInfo

__all__ = ["find_vocabulary_tensors", "vocab_size_of"]

NAMES = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "token_embedding.weight",
    "embed_in.weight", "shared.weight", "backbone.embeddings.weight",
    "lm_head.weight", "lm_head.bias", "embed_out.weight", "output_layer.weight", "lm_head.decoder.weight", "lm_head.decoder.bias",
    "predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias", "vocab_projector.weight", "vocab_projector.bias",
)  # fmt: skip
"""How the names of embeddings and heads end."""

WHOLE_NAMES = ("output.weight", "head.weight", "embeddings.weight", "model.embedding.weight")
"""Names that only mean an embedding or a head when nothing stands before them."""

OTHERS = re.compile(r"(norm|ln_\w+|LayerNorm|position_embeddings|token_type_embeddings|embed_positions|wpe|rotary_emb)\b[^.]*\.[^.]+$")
"""Tensors outside the layers that are certainly something else, however many rows they have."""

IN_LAYER = re.compile(r"\.\d+\.")

SHOWN = 5

HINT = "list the tensors with one row per token in the recipe, as the tokenizer's 'tensors'"


def find_vocabulary_tensors(tensors: Mapping[str, TensorInfo], rows: int | None, named: Sequence[str] = ()) -> list[str]:
    """Names of the tensors whose first dimension is the vocabulary, in the order of `tensors`.

    They are known by name (``NAMES``); config.json's ``vocab_size`` must agree. What has as many rows, stands outside the numbered layers
    and has a name of no known meaning is an error and never a guess.

    Args:
        tensors: of a checkpoint.
        rows: what config.json says the vocabulary's size is, None when it does not say.
        named: the names, if the caller knows them; all must have the same number of rows.

    Raises:
        CheckpointError: they disagree in their number of rows, there are none although there is a vocabulary, or a tensor may be one more.
    """
    if named:
        found = [name for name in tensors if name in set(named)]
    else:
        found = [name for name in tensors if _is_known(name)]
    if not found and rows is not None:
        raise CheckpointError(f"config.json says vocab_size is {rows}, but no tensor is known to be an embedding; {HINT}")
    if not found:
        return []
    sizes = {name: tensors[name].shape[0] if tensors[name].shape else 0 for name in found}
    wanted = sizes[found[0]] if named or rows is None else rows
    odd = [name for name, size in sizes.items() if size != wanted]
    if odd:
        source = "config.json says vocab_size is" if wanted == rows else f"{found[0]!r} has"
        raise CheckpointError(f"{source} {wanted}, but {_listed((f'{name} has {sizes[name]} rows' for name in odd), len(odd))}")
    stored = [name for name in found if not dtypes.is_merged(tensors[name].dtype)]
    if stored:
        raise CheckpointError(f"{stored[0]!r} is of dtype {tensors[stored[0]].dtype}, whose rows are not numbers to merge")
    unclear = [] if named else [name for name, info in tensors.items() if name not in sizes and _may_be_vocabulary(info, wanted)]
    if unclear:
        raise CheckpointError(
            f"{_listed(map(repr, unclear), len(unclear))} {'has' if len(unclear) == 1 else 'have'} {wanted} rows, like the vocabulary, but "
            f"may be something else; {HINT} ({', '.join(found)}, and these if they are meant)"
        )
    return found


def _is_known(name: str) -> bool:
    return name in WHOLE_NAMES or any(name == end or name.endswith("." + end) for end in NAMES)


def _may_be_vocabulary(info: TensorInfo, rows: int) -> bool:
    return (
        bool(info.shape)
        and info.shape[0] == rows
        and dtypes.is_merged(info.dtype)
        and not IN_LAYER.search(info.name)
        and not OTHERS.search(info.name)
    )


def _listed(items: Iterable[str], count: int) -> str:
    shown = [item for item, _ in zip(items, range(SHOWN))]
    return ", ".join(shown) + (f" and {count - SHOWN} more" if count > SHOWN else "")


def vocab_size_of(config: Mapping[str, Any] | None) -> int | None:
    """``vocab_size`` of a config.json; a multimodal model has it in the part about its language model."""
    if config is None:
        return None
    for part in (config, *(config.get(key) for key in ("text_config", "language_config", "llm_config"))):
        size = part.get("vocab_size") if isinstance(part, Mapping) else None
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None
