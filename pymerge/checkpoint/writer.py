"""Writing a checkpoint so that it appears under its name complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from .layout import Layout, Shard

__all__ = ["CheckpointWriter", "check_target", "leftovers"]

PARTIAL = ".partial-"


def is_file_target(out: Path) -> bool:
    """Whether `out` names one .safetensors file rather than a folder."""
    return out.suffix == ".safetensors"


def leftovers(out: Path) -> list[Path]:
    """Unfinished outputs beside `out` that a killed process left."""
    return sorted(out.parent.glob(f"{_escaped(out.name)}{PARTIAL}*")) if out.parent.is_dir() else []


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)


def check_target(out: Path, force: bool) -> str | None:
    """What speaks against writing to `out`, None when nothing does."""
    if not out.name:
        return "is not a name for a new checkpoint"
    ancestor = next(parent for parent in out.parents if parent.exists() or parent.is_symlink())
    if not ancestor.is_dir():
        return f"cannot be made: {ancestor} is not a folder"
    if not os.access(ancestor, os.W_OK | os.X_OK):
        return f"cannot be made: {ancestor} is not writable"
    if out.is_symlink():
        return "is a symbolic link; name the place that it points to"
    if not out.exists():
        return None
    if is_file_target(out):
        if not out.is_file():
            return "exists and is not a file"
        return None if force else "exists already; choose another name or replace it with --force"
    if not out.is_dir():
        return "exists and is not a folder"
    entries = list(os.scandir(out))
    if not entries:
        return None
    if not force:
        return "exists already and is not empty; choose another name or replace it with --force"
    # --force deletes a whole folder, so make sure that it is a checkpoint and not somebody's home.
    if any(entry.is_dir(follow_symlinks=False) for entry in entries) or not any(e.name.endswith(".safetensors") for e in entries):
        return "is not replaced: it holds folders, or no .safetensors file, so it does not look like a checkpoint; delete it yourself"
    return None


class CheckpointWriter:
    """Writes tensors at their final places in files under a temporary name, which :meth:`commit` renames.

    Used as a context manager: whatever ends the block before the commit, an error or Ctrl-C, removes everything that was written.

    Args:
        out: folder to make, or a .safetensors file.
        layout: of everything that will be written.
        force: replace an existing `out`, once the new one is complete.
    """

    def __init__(self, out: str | os.PathLike, layout: Layout, *, force: bool = False) -> None:
        self.out = Path(out)
        self.layout = layout
        self.force = force
        self._single = is_file_target(self.out)
        self._token = secrets.token_hex(4)
        self.partial = self.out.with_name(f"{self.out.name}{PARTIAL}{self._token}")
        self._shard_of: dict[str, Shard] = {name: shard for shard in layout.shards for name in shard.offsets}
        self._unwritten = {name: nbytes for shard in layout.shards for name, nbytes in shard.sizes.items()}
        self._left = {shard.file_name: len(shard.offsets) for shard in layout.shards}
        self._open: dict[str, int] = {}
        self._made: list[Path] = []
        self._done = False

    def __enter__(self) -> CheckpointWriter:
        try:
            self._make_parents()
            if not self._single:
                self.partial.mkdir()
            for shard in self.layout.shards:
                fd = self._fd(shard)
                _write_all(fd, memoryview(shard.head), 0)
                os.ftruncate(fd, shard.size)
                if not shard.offsets:
                    self._finish(shard)
                elif len(self.layout.shards) > 1:
                    os.close(self._open.pop(shard.file_name))
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, *_) -> None:
        if not self._done:
            self._discard()

    def write(self, name: str, data: memoryview, start: int = 0) -> None:
        """Write a tensor's bytes from its byte `start` on; in the end all, each once. A shard is flushed to disk when it is complete."""
        shard = self._shard_of[name]
        _write_all(self._fd(shard), data, shard.offsets[name] + start)
        self._unwritten[name] -= len(data)
        if self._unwritten[name]:
            return
        del self._shard_of[name]
        self._left[shard.file_name] -= 1
        if not self._left[shard.file_name]:
            self._finish(shard)

    def add_file(self, name: str, content: bytes) -> None:
        """Add a small file beside the shards; not possible for a single-file output."""
        fd = os.open(self.partial / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, memoryview(content), 0)
            os.fsync(fd)
        finally:
            os.close(fd)

    def commit(self) -> None:
        """Give the complete output its name.

        Raises:
            RuntimeError: a tensor was not written.
            FileExistsError: `out` appeared meanwhile and `force` is not set.
        """
        if self._shard_of:
            raise RuntimeError(f"{len(self._shard_of)} tensors were not written, the first {next(iter(self._shard_of))!r}")
        if self.layout.index is not None:
            self.add_file("model.safetensors.index.json", self.layout.index)
        if not self._single:
            _sync_folder(self.partial)
        problem = check_target(self.out, self.force)
        if problem:
            raise FileExistsError(f"{self.out}: {problem}")
        if not self._single and self.out.exists() and any(self.out.iterdir()):
            self._swap()
        else:
            os.replace(self.partial, self.out)
        self._done = True
        _sync_folder(self.out.parent)

    def _swap(self) -> None:
        """A folder that is not empty cannot be replaced in one step: move it aside, and back if the second step fails."""
        aside = self.out.with_name(f"{self.out.name}.replaced-{self._token}")
        os.rename(self.out, aside)
        try:
            os.rename(self.partial, self.out)
        except BaseException:
            os.rename(aside, self.out)
            raise
        self._done = True
        shutil.rmtree(aside, ignore_errors=True)

    def _make_parents(self) -> None:
        missing = [parent for parent in self.out.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            self._made.append(parent)

    def _path(self, shard: Shard) -> Path:
        return self.partial if self._single else self.partial / shard.file_name

    def _fd(self, shard: Shard) -> int:
        if shard.file_name not in self._open:
            self._open[shard.file_name] = os.open(self._path(shard), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._open[shard.file_name]

    def _finish(self, shard: Shard) -> None:
        fd = self._open.pop(shard.file_name)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _discard(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        if self._single:
            self.partial.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
        for parent in reversed(self._made):
            try:
                parent.rmdir()
            except OSError:  # somebody else put something there
                break


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
