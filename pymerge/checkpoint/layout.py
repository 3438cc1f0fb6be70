"""Where every byte of the output goes, known before the first is written: the headers of the shards and the places of the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .dtypes import BITS
from .format import MAX_HEADER_BYTES

__all__ = ["Layout", "OutputTensor", "Shard", "make_layout"]

ALIGNMENT = 64
"""Of the data's start, in bytes: a cache line, and enough for any vector load of a memory-mapped tensor."""


@dataclass(frozen=True)
class OutputTensor:
    """Name, safetensors dtype code and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """One file: its name, its first bytes (length and header), its size, and where its tensors begin, from the start of the file."""

    file_name: str
    head: bytes
    size: int
    offsets: dict[str, int]


@dataclass(frozen=True)
class Layout:
    """All files.

    Attributes:
        shards: the files with tensors.
        index: content of model.safetensors.index.json, None when there is one file.
        total_size: bytes of all tensors.
    """

    shards: tuple[Shard, ...]
    index: bytes | None
    total_size: int


def make_layout(tensors: Sequence[OutputTensor], shard_size: int, metadata: Mapping[str, str], file_name: str | None = None) -> Layout:
    """Distribute tensors over shards, in order; a shard holds at most `shard_size` bytes of tensors, or one larger tensor.

    Args:
        tensors: what to write.
        shard_size: bytes.
        metadata: strings for each header.
        file_name: write one file of that name, whatever its size.
    """
    groups: list[list[OutputTensor]] = [[]]
    room = shard_size
    for tensor in tensors:
        if file_name is None and groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = shard_size
        groups[-1].append(tensor)
        room -= tensor.nbytes
    count = len(groups)
    names = [file_name or "model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    shards = tuple(_shard(name, group, metadata) for name, group in zip(names, groups, strict=True))
    total = sum(tensor.nbytes for tensor in tensors)
    index = None
    if count > 1:
        weight_map = {name: shard.file_name for shard in shards for name in shard.offsets}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        index = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return Layout(shards, index, total)


def _shard(file_name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> Shard:
    # Widest elements first, as safetensors itself does, so that every tensor is aligned to its elements.
    ordered = sorted(tensors, key=lambda t: -BITS[t.dtype])
    header: dict = {"__metadata__": dict(metadata)}
    offsets, position = {}, 0
    for t in ordered:
        offsets[t.name] = position
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [position, position + t.nbytes]}
        position += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{file_name}: its header would have {len(text)} bytes, more than the {MAX_HEADER_BYTES} that readers accept")
    head = len(text).to_bytes(8, "little") + text
    return Shard(file_name, head, len(head) + position, {name: len(head) + offset for name, offset in offsets.items()})
