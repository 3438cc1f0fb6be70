"""Checkpoints to test with, written by the safetensors package, and bytes that are almost checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def tensors_of(seed: int, dtype: torch.dtype = torch.float32, layers: int = 3, width: int = 16) -> dict[str, torch.Tensor]:
    """A small language model's tensors."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"lm_head.weight": (40, width), "model.embed_tokens.weight": (40, width), "model.norm.weight": (width,)}
    for i in range(layers):
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (2 * width, width)
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (width, width)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (width,)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def save_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config) -> Path:
    """A model folder with one file or with shards and an index, config.json and a tokenizer file."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": dtype, **config}))
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file_name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file with this header (an object, or bytes as they are)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    """A header's description of a tensor; 2 floats by default."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": list(offsets)}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
