"""LoRA adapters to test with, laid out as PEFT lays them out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def save_adapter(folder: Path, pairs: dict, others: dict | None = None, *, pickled: bool = False, **config) -> Path:
    """An adapter folder.

    Args:
        pairs: module -> (A, B).
        others: tensors of other names.
        config: settings; the rank is that of the first pair unless given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = next((a.shape[0] for a, _ in pairs.values()), 2)
    content = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": sorted(pairs),
        "base_model_name_or_path": "base",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in (others or {}).items()}
    for module, (a, b) in pairs.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a.contiguous(), b.contiguous()
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder
