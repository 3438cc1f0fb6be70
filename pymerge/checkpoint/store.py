"""What a merge reads tensors from, whatever lies behind: safetensors, pickles, a model with an adapter, a re-ordered vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from .format import TensorInfo

__all__ = ["TensorStore"]


class TensorStore(Protocol):
    """Named tensors whose bytes can be read, in any pieces and from several threads.

    Attributes:
        path: what to call it in messages.
        folder: where config.json and the tokenizer lie, None when there is none.
        files: every file that the tensors' bytes depend on.
        tensors: name -> :class:`TensorInfo`, in the order in which reading is fastest.
        nbytes: of all tensors.
    """

    path: Path
    folder: Path | None
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    nbytes: int

    def read_into(self, info: TensorInfo, target: memoryview, start: int = 0) -> None:
        """Fill `target` with the bytes of a tensor from its byte `start` on.

        Raises:
            CheckpointError: the bytes cannot be had; names the file.
        """
        ...

    def close(self) -> None:
        """Close files. Reading opens them again."""
        ...
