"""How deep in the network a tensor lies, told from its name: what gradients are functions of."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["LayerDepths"]

# "model.layers.3.mlp.up_proj.weight", "transformer.h.3.attn", "encoder.block.3.layer.0": the outermost numbered stack is the depth.
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|resblocks|decoder_layers|encoder_layers)\.(\d{1,9})(?=\.|$)")


class LayerDepths:
    """Depths of the tensors of one model.

    Stacks are told apart by what comes before the number, so that a vision tower of 24 layers and a language model of 32 each run
    from 0 to 1.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._count: dict[str, int] = {}
        for name in names:
            found = self._find(name)
            if found:
                stack, index = found
                self._count[stack] = max(self._count.get(stack, 0), index + 1)

    def depth(self, name: str) -> float:
        """layer / (layers - 1), in [0, 1]; 1 in a stack of one layer; 0 for a tensor outside any stack (embeddings, final norm, head)."""
        found = self._find(name)
        if not found or found[0] not in self._count:
            return 0.0
        stack, index = found
        last = self._count[stack] - 1
        return index / last if last else 1.0

    @staticmethod
    def _find(name: str) -> tuple[str, int] | None:
        match = _LAYER.search(name)
        return (name[: match.start(1)], int(match.group(1))) if match else None
