"""Writing an adapter as PEFT reads it."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._version import __version__
from ..dtypes import code_of
from ..layout import Layout, OutputTensor, make_layout
from ..store import TensorStore
from ..target import check_target, clash, lack_of_room
from ..writer import CheckpointWriter
from .adapter import PREFIX, Adapter
from .config import CONFIG

__all__ = ["SavedModule", "adapter_tensors", "check_place", "config_file", "save_adapter"]

Files = Callable[[int, Layout], Mapping[str, bytes]]

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
    files: Files,
    force: bool,
) -> int:
    """Write an adapter folder; it appears complete or not at all.

    Args:
        out: folder to make.
        modules: name -> factors; the scale is alpha / rank.
        others: tensors that replace the base's, by name.
        config: settings of adapter_config.json that this does not determine (base model, task type ...).
        metadata: strings for the weights' header.
        files: called with the number of tensors and the layout for what goes beside them, name -> content.
        force: replace an existing folder.

    Returns:
        Bytes of the tensors.

    Raises:
        FileExistsError: there is something at `out`.
        OSError: writing failed, or would for want of room; nothing is left then.
    """
    tensors = adapter_tensors(modules, others)
    planned = [OutputTensor(name, code_of(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    layout = make_layout(planned, 1, {"format": "pt", "pymerge_version": __version__, **metadata}, WEIGHTS)
    content = {CONFIG: config_file(modules, config), **files(len(tensors), layout)}
    lack = lack_of_room(out, {out: layout.shards[0].size + sum(map(len, content.values()))})
    if lack:
        raise OSError(errno.ENOSPC, lack, str(out))
    with CheckpointWriter(out, layout, force=force) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _bytes(tensor))
        for name, data in content.items():
            writer.add_file(name, data)
        writer.commit()
    return layout.total_size


def adapter_tensors(modules: Mapping[str, SavedModule], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that the weights' file holds, by PEFT's names."""
    tensors: dict[str, Tensor] = {f"{PREFIX}{name}": tensor for name, tensor in others.items()}
    for name, module in modules.items():
        for side, tensor in (("A", module.a), ("B", module.b)):
            key = f"lora_embedding_{side}" if module.kind == "embedding" else f"lora_{side}.weight"
            tensors[f"{PREFIX}{name}.{key}"] = tensor.contiguous()
    return dict(sorted(tensors.items()))


def config_file(modules: Mapping[str, SavedModule], config: Mapping[str, Any]) -> bytes:
    """adapter_config.json: `config`, and what follows from the modules."""
    return (json.dumps({**config, **_shape_of(modules)}, indent=2, sort_keys=True) + "\n").encode()


def check_place(out: Path, force: bool, inputs: Iterable[TensorStore | Adapter]) -> None:
    """
    Raises:
        FileExistsError: an adapter made of `inputs` cannot go to `out`, with the reason.
    """
    problem = check_target(out, force)
    for store in inputs:
        problem = problem or clash(out.resolve(), store.path.resolve(), {file.resolve() for file in store.files})
    if problem:
        raise FileExistsError(f"{out}: {problem}")


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
