"""A checkpoint opened for reading: every header checked, no tensor read until it is asked for.

Tensors are read with preadv into memory of the caller's. A file that was cut short after its header was read gives an error where a
memory map would kill the process with SIGBUS, the interpreter's lock is free during the read, and no page cache is charged to us.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .folder import find_files
from .format import CheckpointError, Header, InputChangedError, TensorInfo, identity_of, open_regular, read_header
from .links import check_link

__all__ = ["Checkpoint", "check_range", "open_checkpoint"]

MAX_OPEN_FILES = 16
"""Per checkpoint: 20 checkpoints of 200 shards must not run into the usual limit of 1024 descriptors."""


class Checkpoint:
    """The tensors of one checkpoint, see :func:`open_checkpoint`.

    Attributes:
        path: as given.
        folder: where config.json and the tokenizer lie, None for a single file outside any model folder.
        headers: one per file.
        files: every file that the tensors' bytes depend on.
        tensors: name -> :class:`TensorInfo`, in the order of files and of the data in them.
        nbytes: of all tensors.
        aliases: name -> the earlier name whose tensor is the same piece of memory; a safetensors file never has any.
    """

    def __init__(self, path: Path, folder: Path | None, index: Path | None, headers: list[Header]) -> None:
        self.path = path
        self.folder = folder
        self.index = index
        self.headers = headers
        self.files = tuple(header.file for header in headers)
        self.tensors: dict[str, TensorInfo] = {name: info for header in headers for name, info in header.tensors.items()}
        self.nbytes = sum(info.nbytes for info in self.tensors.values())
        self.aliases: dict[str, str] = {}
        self._by_file = {header.file: header for header in headers}
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._in_use: dict[int, int] = {}
        self._lock = threading.Lock()

    def read_into(self, info: TensorInfo, target: memoryview, start: int = 0) -> None:
        """Fill `target` with the bytes of a tensor from its byte `start` on. Safe to call from several threads.

        Raises:
            CheckpointError: the file ended, changed since its header was read, or cannot be read.
        """
        check_range(info, target, start)
        self._read_at(info, info.offset + start, target)

    def _read_at(self, info: TensorInfo, position: int, view: memoryview) -> None:
        """Fill `view` from a byte of the file that holds a tensor on."""
        fd = self._acquire(info.file)
        try:
            while len(view):
                count = os.preadv(fd, [view], position)
                if count == 0:
                    raise CheckpointError(
                        f"{info.file}: ends at byte {position}, inside tensor {info.name!r}; it was truncated after it was opened: "
                        "run this again when it is complete"
                    )
                position, view = position + count, view[count:]
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} cannot be read: {error.strerror}; check the disk, or copy the file to another one"
            ) from None
        finally:
            self._release(fd)

    @contextmanager
    def place(self, info: TensorInfo) -> Iterator[tuple[int, int]]:
        """An open file and the byte of it where a tensor begins, for native code to read while the context lasts.

        Raises:
            CheckpointError: the file changed since its header was read, or cannot be opened.
        """
        fd = self._acquire(info.file)
        try:
            yield fd, info.offset
        finally:
            self._release(fd)

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _acquire(self, file: Path) -> int:
        with self._lock:
            fd = self._open.get(file)
            if fd is None:
                fd, stat = open_regular(file)
                if identity_of(stat) != self._by_file[file].identity:
                    os.close(fd)
                    raise InputChangedError(f"{file}: changed since its header was read; run this again when nothing writes to the models")
                self._open[file] = fd
            self._open.move_to_end(file)
            self._in_use[fd] = self._in_use.get(fd, 0) + 1
            return fd

    def _release(self, fd: int) -> None:
        with self._lock:
            self._in_use[fd] -= 1
            if not self._in_use[fd]:
                del self._in_use[fd]
            for file, idle in list(self._open.items()):
                if len(self._open) <= MAX_OPEN_FILES:
                    break
                if idle not in self._in_use:
                    os.close(self._open.pop(file))


def check_range(info: TensorInfo, target: memoryview, start: int) -> None:
    """Raises ValueError when `target` is not a piece of the tensor from its byte `start` on."""
    if start < 0 or start + len(target) > info.nbytes:
        raise ValueError(f"{info.name!r} has {info.nbytes} bytes; {len(target)} from byte {start} were asked for")


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint: a file, a folder with model.safetensors or with shards and an index, or an index file.

    Files in PyTorch's own format (pytorch_model.bin, .pt, .pth) are read too, as data, never run; of a folder that has both kinds, the
    safetensors files are taken.

    Raises:
        CheckpointError: there is none, or any of its files is malformed. Every header has been checked when this returns.
    """
    path = Path(path)
    try:
        layout = find_files(path)
    except OSError as error:
        reason = "the path is too long" if error.errno == errno.ENAMETOOLONG else error.strerror
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(path)!r}: cannot be opened: {error}") from None  # a null byte in the path
    if layout.folder is not None:
        for file in layout.files:
            check_link(file)
    folder = layout.folder or _model_folder(path)
    if layout.pickled:
        from .pickled import PickledCheckpoint  # torch is needed for these alone

        checkpoint: Checkpoint = PickledCheckpoint(path, folder, layout.index, layout.files)
    else:
        checkpoint = Checkpoint(path, folder, layout.index, [read_header(file) for file in layout.files])
    if layout.weight_map is not None:
        _check_index(layout.index, layout.weight_map, checkpoint.headers)
    return checkpoint


def _model_folder(file: Path) -> Path | None:
    """The folder of a single file, when it is that of a model: the file is all there is of the weights in it."""
    folder = file.parent
    return folder if (folder / "config.json").is_file() and len(list(folder.glob(f"*{file.suffix}"))) == 1 else None


def _check_index(index: Path | None, weight_map, headers: list[Header]) -> None:
    """The index and the shards must tell the same story."""
    held = {header.file.name: header.tensors for header in headers}
    for name, file_name in weight_map.items():
        if name not in held[file_name]:
            raise CheckpointError(f"{index}: says that {name!r} is in {file_name}, which does not have it: download them again")
    for file_name, tensors in held.items():
        for name in tensors:
            if name not in weight_map:
                raise CheckpointError(f"{index}: does not list {name!r}, which {file_name} holds: download them again")
            if weight_map[name] != file_name:
                raise CheckpointError(
                    f"{index}: says that {name!r} is in {weight_map[name]}, but {file_name} holds it too: download them again"
                )
