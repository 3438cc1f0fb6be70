"""The result of a merge that has not been carried out, for planning others that use it."""

from __future__ import annotations

from pathlib import Path

from .beside import extra_files
from .format import CheckpointError, TensorInfo
from .plan import Plan

__all__ = ["PlannedStore"]


class PlannedStore:
    """A :class:`pymerge.checkpoint.store.TensorStore` that knows all about its tensors but their values.

    Args:
        plan: of the merge.
        path: where its result will be.
        folder: an empty one, for config.json, the tokenizer and what else the result will have beside its weights.
    """

    def __init__(self, plan: Plan, path: Path, folder: Path) -> None:
        for name, content in extra_files(plan).items():
            (folder / name).write_bytes(content)
        self.path = path
        self.folder = folder
        self.files: tuple[Path, ...] = ()
        outputs = {tensor.output.name: tensor.output for tensor in plan.tensors}
        # In the order of the files and of the data in them, as the result is read.
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(name, outputs[name].dtype, outputs[name].shape, path / shard.file_name, offset, outputs[name].nbytes)
            for shard in plan.layout.shards
            for name, offset in shard.offsets.items()
        }
        self.nbytes = plan.layout.total_size

    def read_into(self, info: TensorInfo, target: memoryview, start: int = 0) -> None:
        """
        Raises:
            CheckpointError: always; there is nothing to read yet.
        """
        raise CheckpointError(f"{self.path}: has not been merged yet")

    def close(self) -> None:
        """There is nothing to close."""
