"""Which layer of which stack a tensor belongs to, told from its name: what slices cut and gradients are functions of."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["LayerDepths", "find_layer", "side_of", "stacks_of"]

# "model.layers.3.mlp.up_proj.weight", "transformer.h.3.attn", "encoder.block.3.layer.0": the outermost numbered stack is the depth.
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|resblocks|decoder_layers|encoder_layers)\.(\d{1,9})(?=\.|$)")

# Tensors outside the layers. GPT-NeoX calls its head embed_out.
_BEFORE = re.compile(
    r"embed(?!_out)|(?:^|[._])(?:emb|wte|wpe|shared|patch_conv|conv1|conv2|ln_pre|layernorm_pre|project_in|rotary|relative_pe)(?:[._]|$)|class_embedding"
)
_AFTER = re.compile(
    r"embed_out|norm|(?:^|[._])(?:ln_f|ln_post|head|lm_head|output|output_layer|score|classifier|pre_classifier|pooler|cls|predictions|"
    r"final|project_out|vocab_transform|vocab_projector|qa_outputs|logits|proj|dense)(?:[._]|$)"
)


def find_layer(name: str) -> tuple[str, int, str] | None:
    """("model.layers.", 3, ".mlp.up_proj.weight"): stack, layer and the rest of a tensor's name; None outside the layers."""
    match = _LAYER.search(name)
    return (name[: match.start(1)], int(match.group(1)), name[match.end(1) :]) if match else None


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Stack -> number of its layers (the highest and one), in the order of the names."""
    count: dict[str, int] = {}
    for name in names:
        found = find_layer(name)
        if found:
            count[found[0]] = max(count.get(found[0], 0), found[1] + 1)
    return count


def side_of(name: str) -> str | None:
    """ "before" or "after" the layers, for a tensor outside them; None when its name does not tell."""
    if _BEFORE.search(name):
        return "before"
    return "after" if _AFTER.search(name) else None


class LayerDepths:
    """Depths of the tensors of one model.

    Stacks are told apart by what comes before the number, so that a vision tower of 24 layers and a language model of 32 each run
    from 0 to 1.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._count = stacks_of(names)

    def depth(self, name: str) -> float:
        """layer / (layers - 1), in [0, 1]; 1 in a stack of one layer; 0 for a tensor outside any stack (embeddings, final norm, head)."""
        found = find_layer(name)
        if not found or found[0] not in self._count:
            return 0.0
        last = self._count[found[0]] - 1
        return found[1] / last if last else 1.0
