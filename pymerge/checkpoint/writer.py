"""Writing a checkpoint so that it appears under its name complete or not at all, and so that what is done outlives the process."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .journal import datasync
from .layout import Layout, Shard
from .notes import add_note, naming
from .partial import JOURNAL, Partial, committed
from .rename import sync_folder
from .resume import ResumeError, difference
from .sizes import format_bytes
from .target import UNFINISHED, check_target, is_file_target

__all__ = ["CheckpointWriter"]

SYNC_SECONDS = 5.0
SYNC_BYTES = 2**30
"""How much work a power cut may cost: what is done is flushed and recorded this often, beside the writing."""

MOST_OPEN = 64
"""Files with tensors that were not flushed yet."""


MARK = 16
"""Bytes of a file's mark: a random number."""

START_OVER = "to start over, merge with --force (force=True) and without resuming"


class CheckpointWriter:
    """Writes tensors at their final places in files beside `out`, which :meth:`commit` gives their name.

    Used as a context manager: whatever ends the block before the commit removes what was written, unless :meth:`keep` was called or it was
    an earlier process that wrote it. A process that dies leaves it, see :mod:`pymerge.checkpoint.partial`; nothing there can be taken for a
    checkpoint, because the header of a file is written when all of its tensors are on the disk.

    Args:
        out: folder to make, or a .safetensors file.
        layout: of everything that will be written.
        force: replace an existing `out`, once the new one is complete; throw away an unfinished one.
        resume: continue an unfinished one.
        description: of what will be written, plain values for JSON. An unfinished output is continued where it is the same; one without
            is thrown away.

    Attributes:
        done: names of the tensors that are on the disk.
        committed: whether the output has its name.
        warnings: what could not be made sure of.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        layout: Layout,
        *,
        force: bool = False,
        resume: bool = False,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self.out = Path(out)
        self.layout = layout
        self.force = force
        self.resume = resume
        self.done: set[str] = set()
        self.committed = False
        self.records: list[dict[str, Any]] = []
        self._description = dict(description or {})
        self._partial = Partial(self.out)
        self._shard_of: dict[str, Shard] = {name: shard for shard in layout.shards for name in shard.offsets}
        self._size = {name: size for shard in layout.shards for name, size in _sizes(shard)}
        self._missing = dict(self._size)
        self._added: list[str] = []
        self._marks: dict[str, str] = {}
        self._open: dict[str, int] = {}
        self._made: list[Path] = []
        self._keep = False
        self._lock = threading.Lock()  # guards the three below and `_open`
        self._complete: list[str] = []
        self._dirty: set[str] = set()
        self._unsynced = 0
        self._syncing = threading.Lock()
        self._wake, self._stop = threading.Event(), False
        self._failure: BaseException | None = None
        self._syncer: threading.Thread | None = None

    @property
    def warnings(self) -> list[str]:
        return self._partial.warnings

    def __enter__(self) -> CheckpointWriter:
        try:
            self._make_parents()
            self.records = self._partial.open()
        except BaseException:
            self._remove_parents()
            raise
        self._keep = bool(self.records)  # what others left stays, whatever is wrong with us
        try:
            self._begin()
        except BaseException:
            self._leave()
            raise
        self._syncer = threading.Thread(target=self._sync_now_and_then, name="pymerge-sync", daemon=True)
        self._syncer.start()
        return self

    def _begin(self) -> None:
        if committed(self.out, self.records):
            if self.resume and difference(self.records[0]["begun"], self._description) is None:
                self.committed = True
                self.done = set(self._size)
                return
            self._start_over()
        problem = check_target(self.out, self.force)
        if problem:
            raise FileExistsError(f"{self.out}: {problem}")
        if self.records and self.resume:
            reason = difference(self.records[0]["begun"], self._description)
            if reason:
                raise ResumeError(f"{self._partial.folder}: cannot be continued: {reason}; {START_OVER}")
        elif self.records:
            if self.records[0]["begun"] and not self.force:  # without a description nobody could continue it
                raise FileExistsError(f"{self._partial.folder}: {UNFINISHED}")
            self._start_over()
        if not self.records:
            self._record({"begun": self._description})
        if self._partial.content.is_symlink():
            raise FileExistsError(f"{self._partial.content}: is a symbolic link, where the unfinished files were expected; remove it")
        self._partial.content.mkdir(exist_ok=True)
        recorded: dict[str, set[str]] = {}
        for record in self.records:
            for mark, names in record.get("done", {}).items():
                recorded.setdefault(mark, set()).update(names)
        for shard in self.layout.shards:
            self._prepare(shard, recorded)
        sync_folder(self._partial.content)
        self._keep = bool(self.done)  # also when Ctrl-C comes before keep() or discard() can be called

    def _start_over(self) -> None:
        self._partial.clear()
        self.records = []
        self._keep = False

    def _prepare(self, shard: Shard, recorded: Mapping[str, set[str]]) -> None:
        """Make a shard's file, or trust what is in it as far as the journal does.

        A file bears a mark, where its header will be, by which the journal calls it: what is recorded of a file that was made anew since,
        or that something else took the place of, says nothing about this one.
        """
        fd = os.open(self._path(shard), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            head = os.pread(fd, len(shard.head), 0) if os.fstat(fd).st_size == shard.size else b""
            every = shard.offsets.keys()
            if head == shard.head:
                mark, done = next(((m, names & every) for m, names in recorded.items() if names >= every), ("", set()))
            else:
                mark = head[8 : 8 + MARK].hex() if head[:8] == bytes(8) else ""
                done = recorded.get(mark, set()) & every
            if not done:
                mark = secrets.token_hex(MARK)
                with naming(self._path(shard)):
                    os.ftruncate(fd, 0)
                    os.ftruncate(fd, shard.size)
                    _write_all(fd, memoryview(bytes.fromhex(mark)), 8)
        finally:
            os.close(fd)
        self._marks[shard.file_name] = mark
        self.done.update(done)
        if not every or (len(done) == len(every) and head != shard.head):
            self._finish(shard)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self._stop_syncing()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = format_bytes(shutil.disk_usage(self.out.parent).free)
            add_note(error, f"{format_bytes(self._to_write())} were still to be written, and {self.out.parent} has {free} free")
        self._leave()

    def _to_write(self) -> int:
        return sum(size for name, size in self._size.items() if name not in self.done)

    def write(self, name: str, data: memoryview, start: int = 0) -> None:
        """Write bytes of a tensor, from its byte `start` on. Every byte of it is to be written once; several threads may."""
        if self._failure is not None:
            raise self._failure
        shard, size = self._shard_of[name], self._size[name]
        if start + len(data) > size:
            raise ValueError(f"{name!r} has {size} bytes; {len(data)} were to be written from byte {start} on")
        with naming(self._path(shard)):
            _write_all(self._fd(shard), data, shard.offsets[name] + start)
        with self._lock:
            self._missing[name] -= len(data)
            if self._missing[name] == 0:
                self._complete.append(name)
            self._dirty.add(shard.file_name)
            self._unsynced += len(data)
            many, much = len(self._open) > MOST_OPEN, self._unsynced >= SYNC_BYTES
        if many:
            self.sync()
        elif much:
            self._wake.set()

    def sync(self) -> None:
        """Flush what is written and record the tensors that are complete."""
        with self._syncing:
            with self._lock:
                names, self._complete = self._complete, []
                dirty, self._dirty = self._dirty, set()
                self._unsynced = 0
            for file_name in dirty:
                with naming(self._partial.content / file_name):
                    datasync(self._open[file_name])
            if not names:
                return
            done = self.done.union(names)
            recorded: dict[str, list[str]] = {}
            for name in names:
                recorded.setdefault(self._marks[self._shard_of[name].file_name], []).append(name)
            self._record({"done": recorded})
            self.done = done
            # Only now, because a header takes the place of the mark; a process that resumes writes those that are missing.
            for shard in {self._shard_of[name].file_name: self._shard_of[name] for name in names}.values():
                if done.issuperset(shard.offsets):
                    self._finish(shard)

    def record(self, **values: Any) -> None:
        """Add something to the journal; a process that resumes finds it in `records`."""
        with self._syncing:
            self._record(values)

    def _record(self, values: dict[str, Any]) -> None:
        with naming(self._partial.folder / JOURNAL):
            self._partial.journal.append(values)

    def keep(self) -> str | None:
        """Keep what is done when the block ends, for a process that resumes. What to tell people about it; None if nothing is done."""
        self._keep = True  # first: a second Ctrl-C may come while the disk is slow
        try:
            self._stop_syncing()
            if self._failure is None:
                self.sync()
        except OSError:  # the disk is full, say: what was recorded before counts
            pass
        self._keep = bool(self.done)
        if not self._keep or self.committed:
            return None
        nbytes = sum(self._size[name] for name in self.done)
        return (
            f"{self._partial.folder} keeps the {len(self.done)} of {len(self._size)} tensors that are done ({format_bytes(nbytes)}): "
            "the same command with --resume (resume=True) continues there"
        )

    def discard(self) -> None:
        """Remove what is done when the block ends, also what an earlier process did."""
        self._keep = False

    def add_file(self, name: str, content: bytes) -> None:
        """Add a small file beside the shards; not possible for a single-file output."""
        self._added.append(name)
        path = self._partial.content / name
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with naming(path):
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
        if self.committed:
            return
        self._stop_syncing()
        if self._failure is not None:
            raise self._failure
        self.sync()
        missing = [name for name in self._size if name not in self.done]
        if missing:
            raise RuntimeError(f"{len(missing)} tensors were not written, the first {missing[0]!r}")
        if self.layout.index is not None:
            self.add_file("model.safetensors.index.json", self.layout.index)
        self._check_strangers()
        sync_folder(self._partial.content)
        problem = check_target(self.out, self.force)
        if problem:
            raise FileExistsError(f"{self.out}: {problem}")
        content = self._partial.content
        self._partial.commit(content / self.layout.shards[0].file_name if is_file_target(self.out) else content)
        self.committed = True
        for parent in self._made:
            sync_folder(parent.parent)

    def _check_strangers(self) -> None:
        """Everything in the folder gets the output's name, so it must be of our making."""
        ours = {*self._added, *(shard.file_name for shard in self.layout.shards)}
        other = next(
            (
                entry.name
                for entry in os.scandir(self._partial.content)
                if entry.name not in ours or not entry.is_file(follow_symlinks=False)
            ),
            None,
        )
        if other is not None:
            raise FileExistsError(
                f"{self._partial.content}: holds {other!r}, which is not of this merge; move it away and merge with --resume"
            )

    def _sync_now_and_then(self) -> None:
        try:
            while not self._stop:
                self._wake.wait(SYNC_SECONDS)
                self._wake.clear()
                if not self._stop:
                    self.sync()
        except BaseException as error:
            self._failure = error

    def _stop_syncing(self) -> None:
        self._stop = True
        self._wake.set()
        if self._syncer is not None:
            self._syncer.join()

    def _make_parents(self) -> None:
        missing = [parent for parent in self.out.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            self._made.append(parent)

    def _remove_parents(self) -> None:
        for parent in reversed(self._made):
            try:
                parent.rmdir()
            except OSError:  # somebody put something there
                break

    def _path(self, shard: Shard) -> Path:
        return self._partial.content / shard.file_name

    def _fd(self, shard: Shard) -> int:
        with self._lock:
            if shard.file_name not in self._open:
                self._open[shard.file_name] = os.open(self._path(shard), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            return self._open[shard.file_name]

    def _finish(self, shard: Shard) -> None:
        """All tensors of a shard are on the disk: its header makes it a file that can be read."""
        fd = self._fd(shard)
        try:
            with naming(self._path(shard)):
                _write_all(fd, memoryview(shard.head), 0)
                os.fsync(fd)
        finally:
            with self._lock:
                os.close(self._open.pop(shard.file_name))

    def _leave(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        if self._keep and not self.committed:
            self._partial.close()
            return
        self._partial.remove()
        if not self.committed:
            self._remove_parents()


def _sizes(shard: Shard) -> list[tuple[str, int]]:
    names, begins = list(shard.offsets), list(shard.offsets.values())
    return [(name, end - begin) for name, begin, end in zip(names, begins, [*begins[1:], shard.size], strict=True)]


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
