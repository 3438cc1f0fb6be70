"""Quantised checkpoints: their stored codes mean something only together with scales, so merging the codes would be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .store import TensorStore

__all__ = ["sign_of_quantisation"]

SCALES = ("weight_scale_inv", "weight_scale", "scale_weight", "input_scale", "scale_input")
"""Names of the scales that stand beside fp8 weights: DeepSeek's and vLLM's, and those of scaled fp8 diffusion models."""

PACKED = ("qweight", "qzeros", "g_idx", "weight.absmax", "weight.quant_map", "SCB", "weight_packed", "scaled_fp8")
"""Names that GPTQ, AWQ, bitsandbytes, compressed-tensors and scaled fp8 models give to what they store."""


def sign_of_quantisation(store: TensorStore, config: Mapping[str, Any] | None) -> str | None:
    """What shows that a checkpoint is quantised, None when nothing does. Plain fp8 weights, without scales, are numbers like any other."""
    if config and config.get("quantization_config"):
        return "quantization_config in its config.json"
    for name, info in store.tensors.items():
        module, _, last = name.rpartition(".")
        if any(name == part or name.endswith(f".{part}") for part in PACKED):
            return f"it has {name!r}"
        weight = store.tensors.get(f"{module}.weight")
        if last in SCALES and weight is not None and weight.dtype.startswith("F8"):
            return f"{weight.name!r} is scaled fp8, by {name!r}"
        if info.dtype.startswith(("F4", "F6_", "F8_E8M0")):
            return f"{name!r} is of dtype {info.dtype}"
    return None
