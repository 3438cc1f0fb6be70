"""An adapter on disk: which modules it changes, by which factors, and what it holds besides."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..folder import ADAPTER_WEIGHTS, adapter_weights
from ..format import CheckpointError, TensorInfo
from ..load import load_tensor
from ..reader import Checkpoint, open_checkpoint
from .config import CONFIG, AdapterConfig, read_adapter_config

__all__ = ["Adapter", "LowRank", "is_adapter", "open_adapter"]

PREFIX = "base_model.model."

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:(?P<side>[AB])\.(?P<part>weight|bias)|embedding_(?P<embedding>[AB]))")
_FOREIGN = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_down": "a LoRA in kohya's format; convert it to PEFT's",
    "lora_up": "a LoRA in kohya's format; convert it to PEFT's",
    "hada_": "LoHa's factors",
    "lokr_": "LoKr's factors",
    "lora_E": "AdaLoRA's singular values",
}


@dataclass
class LowRank:
    """The change of one module's weight: ``scale * B @ A``.

    Attributes:
        module: name of the module, without PEFT's prefix.
        kind: "linear" (B is out x rank, A rank x in), "embedding" (the weight is the transpose, A being rank x vocabulary), or "conv"
            (A is rank x in x kernel, B out x rank x 1...).
        a, b: the factors.
        bias: of the product, which is added to the module's bias (``lora_bias``), or None.
        scale: alpha / rank, or alpha / sqrt(rank).
    """

    module: str
    kind: str
    a: TensorInfo
    b: TensorInfo
    bias: TensorInfo | None
    scale: float

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b.shape[1]

    @property
    def nbytes(self) -> int:
        """Of both factors."""
        return self.a.nbytes + self.b.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in, *kernel); of an embedding (vocabulary, dimension)."""
        return (self.a.shape[1], self.b.shape[0]) if self.kind == "embedding" else (self.b.shape[0], *self.a.shape[1:])


@dataclass
class Adapter:
    """A LoRA adapter, see :func:`open_adapter`.

    Attributes:
        path, folder: as given; where its config lies.
        config: what the factors mean.
        modules: name -> its change.
        replaced: names of the base's tensors (without PEFT's prefix) -> what stands in their place: trained biases, ``modules_to_save``,
            resized embeddings.
        store: what the factors are read from.
        files: everything that it was read from.
    """

    path: Path
    folder: Path
    config: AdapterConfig
    store: Checkpoint
    modules: dict[str, LowRank] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Config and weights."""
        return (self.folder / CONFIG, *self.store.files)

    def factors(self, change: LowRank) -> tuple[Tensor, Tensor]:
        """B (out x rank) and A (rank x everything else), as stored."""
        a, b = load_tensor(self.store, change.a), load_tensor(self.store, change.b)
        return b.reshape(b.shape[0], b.shape[1]), a.reshape(a.shape[0], -1)

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        self.store.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a path is a folder with an adapter."""
    return (Path(path) / CONFIG).is_file()


def open_adapter(path: str | os.PathLike) -> Adapter:
    """Open a LoRA adapter as PEFT saves it: a folder with adapter_config.json and adapter_model.safetensors or .bin. Reads headers only.

    Raises:
        CheckpointError: there is none, its files are malformed or contradict each other, or it is of a kind that is not a plain
            ``base + scale * B @ A``; the message says which.
    """
    folder = Path(path)
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: is not a LoRA adapter: a folder with {CONFIG} is expected")
    config = read_adapter_config(folder)
    file = adapter_weights(folder)
    if file is None:
        raise CheckpointError(f"{folder}: has {CONFIG}, but neither {' nor '.join(ADAPTER_WEIGHTS)}")
    store = open_checkpoint(file)
    adapter = Adapter(folder, folder, config, store)
    _sort_tensors(adapter, file)
    if not adapter.modules and not adapter.replaced:
        raise CheckpointError(f"{file}: has no tensors")
    return adapter


def _sort_tensors(adapter: Adapter, file: Path) -> None:
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in adapter.store.tensors.items():
        plain = name.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(plain)
        if match:
            side = (
                f"embedding_{match['embedding']}" if match["embedding"] else match["side"] + ("" if match["part"] == "weight" else ".bias")
            )
            if found.setdefault(match["module"], {}).setdefault(side, info) is not info:
                raise CheckpointError(f"{file}: has lora_{side} of {match['module']!r} twice, with and without the prefix {PREFIX!r}")
            continue
        for part, meaning in _FOREIGN.items():
            if part in plain:
                raise CheckpointError(f"{file}: tensor {name!r} is not of a plain LoRA: {meaning}")
        if ".lora_" in plain:
            raise CheckpointError(f"{file}: tensor {name!r} is not a factor that PEFT saves; expected MODULE.lora_A.weight or the like")
        # What is trained whole stands under the module's own name; PEFT's wrappers show where a module is adapted too.
        plain = plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if adapter.replaced.setdefault(plain, info) is not info:
            raise CheckpointError(f"{file}: has {plain!r} twice")
    for module, sides in found.items():
        adapter.modules[module] = _low_rank(module, sides, adapter.config, file)


def _low_rank(module: str, sides: dict[str, TensorInfo], config: AdapterConfig, file: Path) -> LowRank:
    embedding = "embedding_A" in sides or "embedding_B" in sides
    first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if first not in sides or second not in sides or (embedding and len(sides) > 2):
        raise CheckpointError(
            f"{file}: module {module!r} has {', '.join(f'lora_{side}' for side in sorted(sides))}; a pair of A and B is expected"
        )
    a, b, bias = sides[first], sides[second], sides.get("B.bias")
    if "A.bias" in sides:
        raise CheckpointError(f"{file}: module {module!r} has lora_A.bias, which PEFT never saves")
    where = f"{file}: module {module!r}: lora_{first} is {list(a.shape)} and lora_{second} {list(b.shape)}"
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or a.shape[0] != b.shape[1] or math.prod(b.shape[2:]) != 1 or not a.shape[0]:
        raise CheckpointError(f"{where}; [rank, in, ...] and [out, rank, 1...] are expected")
    if a.shape[0] != config.rank_of(module):
        raise CheckpointError(f"{where}, but {CONFIG} says that its rank is {config.rank_of(module)} (r, rank_pattern)")
    if bias is not None and bias.shape != (b.shape[0],):
        raise CheckpointError(f"{where}; lora_B.bias is {list(bias.shape)}, not [{b.shape[0]}]")
    kind = "embedding" if embedding else "linear" if len(a.shape) == 2 else "conv"
    return LowRank(module, kind, a, b, bias, config.scale_of(module))


def widened(*tensors: Tensor) -> list[Tensor]:
    """Tensors in the dtype that products are computed in: fp64 if any is fp64, else fp32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]
