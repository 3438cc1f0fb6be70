"""Writing an adapter as PEFT reads it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._version import __version__
from ..dtypes import code_of
from ..layout import OutputTensor, make_layout
from ..writer import CheckpointWriter
from .adapter import PREFIX
from .config import CONFIG

__all__ = ["SavedModule", "save_adapter"]

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class SavedModule:
    """One module's factors as they are written: `a` and `b` in their final dtype and PEFT's shapes, see :class:`.adapter.LowRank`."""

    kind: str
    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


def save_adapter(
    out: Path,
    modules: Mapping[str, SavedModule],
    others: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    card: str,
    force: bool,
) -> None:
    """Write an adapter folder; it appears complete or not at all.

    Args:
        out: folder to make.
        modules: name -> factors; the scale is alpha / rank.
        others: tensors that replace the base's, by name.
        config: settings of adapter_config.json that this does not determine (base model, task type ...).
        metadata: strings for the weights' header.
        card: text of README.md.
        force: replace an existing folder.
    """
    tensors: dict[str, Tensor] = {f"{PREFIX}{name}": tensor for name, tensor in others.items()}
    for name, module in modules.items():
        for side, tensor in (("A", module.a), ("B", module.b)):
            key = f"lora_embedding_{side}" if module.kind == "embedding" else f"lora_{side}.weight"
            tensors[f"{PREFIX}{name}.{key}"] = tensor.contiguous()
    tensors = dict(sorted(tensors.items()))
    planned = [OutputTensor(name, code_of(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    layout = make_layout(planned, 1, {"format": "pt", "pymerge_version": __version__, **metadata}, WEIGHTS)
    content = json.dumps({**config, **_shape_of(modules)}, indent=2, sort_keys=True) + "\n"
    with CheckpointWriter(out, layout, force=force) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _bytes(tensor))
        writer.add_file(CONFIG, content.encode())
        writer.add_file("README.md", card.encode())
        writer.commit()


def _shape_of(modules: Mapping[str, SavedModule]) -> dict[str, Any]:
    """Ranks and alphas: the commonest ones for all, patterns for the others. Patterns are whole names, which no other module matches."""
    (rank, alpha), _ = Counter((m.rank, m.alpha) for m in modules.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {name: m.rank for name, m in modules.items() if m.rank != rank},
        "alpha_pattern": {name: _whole(m.alpha) for name, m in modules.items() if m.alpha != alpha},
        "target_modules": sorted(modules),
    }


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    data = bytearray(tensor.numel() * tensor.element_size())
    torch.frombuffer(data, dtype=torch.uint8).copy_(tensor.reshape(-1).view(torch.uint8))
    return memoryview(data)
