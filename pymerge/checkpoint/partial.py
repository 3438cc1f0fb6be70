"""The folder beside an output in which it is made.

``OUT.partial/`` holds ``journal.jsonl`` (what was planned, which tensors are on the disk), ``output/`` (the files) and, for a moment and
only where two folders cannot be swapped in one step, ``replaced/`` (what was at OUT before). Its name is fixed, so that the next process
finds it; a lock on the journal, which the kernel frees when its holder dies, lets one process at a time work in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from .journal import Journal
from .notes import naming
from .rename import exchange, sync_folder

__all__ = ["OutputInUseError", "Partial", "partial_of", "peek"]

JOURNAL = "journal.jsonl"

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What network filesystems without locks answer."""


class OutputInUseError(FileExistsError):
    """Another process is writing to the same output."""


def partial_of(out: Path) -> Path:
    """Where an unfinished `out` is kept."""
    return out.with_name(out.name + ".partial")


def peek(out: Path) -> str | None:
    """What was left beside `out`: "begun" or "committed" work, None for nothing that can be told. Changes nothing.

    Raises:
        OutputInUseError: another process is at work there.
    """
    try:
        fd = os.open(partial_of(out) / JOURNAL, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # what is wrong with it is said when it is opened in earnest
        return None
    try:
        _take(fd, fcntl.LOCK_SH, out)
        records = Journal(fd).load()
    finally:
        os.close(fd)
    if not records:
        return None
    return "committed" if committed(out, records) else "begun"


def committed(out: Path, records: list[dict[str, Any]]) -> bool:
    """Whether an output got its name already and only cleaning up was left."""
    return any("commit" in record and out.exists() and record["commit"] == _identity(out) for record in records)


def _take(fd: int, kind: int, out: Path) -> bool:
    """Lock a journal. False where the filesystem has no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputInUseError(f"{out}: another process is writing it (it holds {partial_of(out)}); wait for it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


class Partial:
    """The unfinished state of one output, held by this process from :meth:`open` to :meth:`close`.

    Attributes:
        out: the output.
        folder: the state's.
        content: folder of the output's files.
        warnings: what could not be made sure of.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = partial_of(out)
        self.content = self.folder / "output"
        self.warnings: list[str] = []
        self.journal: Journal
        self._replaced = self.folder / "replaced"

    def open(self) -> list[dict[str, Any]]:
        """Make the folder or take it over; the journal's records.

        Raises:
            OutputInUseError: another process has it.
            OSError: it cannot be made.
        """
        self.journal = Journal(self._lock())
        try:
            self._restore()
            records = self.journal.load()
            if not records or "begun" not in records[0]:
                others = [entry.name for entry in self.folder.iterdir() if entry.name != JOURNAL]
                if others and (self.folder / JOURNAL).stat().st_size:
                    raise FileExistsError(f"{self.folder}: cannot be continued, its {JOURNAL} is damaged; remove it to start over")
                if others:
                    raise FileExistsError(f"{self.folder}: is not an unfinished output of pymerge (it holds {others[0]!r}); move it away")
                sync_folder(self.folder)
                sync_folder(self.folder.parent)
            return records
        except BaseException:
            self.close()
            raise

    def _restore(self) -> None:
        """A process died between the two renames of commit()."""
        if self._replaced.exists() and not self.out.exists():
            os.rename(self._replaced, self.out)

    def _lock(self) -> int:
        path = self.folder / JOURNAL
        while True:
            if self.folder.is_symlink():
                raise FileExistsError(f"{self.folder}: is a symbolic link, where an unfinished output was expected; remove it")
            self.folder.mkdir(exist_ok=True)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # its last user has just removed the folder
                continue
            try:
                if not _take(fd, fcntl.LOCK_EX, self.out):
                    self.warnings.append(f"{self.folder}: its filesystem has no locks; make sure that nothing else writes {self.out}")
                if _same(path, os.fstat(fd)):
                    return fd
                os.close(fd)
            except BaseException:
                os.close(fd)
                raise

    def commit(self, source: Path) -> None:
        """Give `source`, the complete output, its name. Whatever was there is replaced; remove it with :meth:`remove`."""
        # After a swap, `source` is what was replaced. This record tells a later process which of the two is which.
        with naming(self.folder / JOURNAL):
            self.journal.append({"commit": _identity(source)})
        if source.is_dir() and self.out.exists() and any(self.out.iterdir()):
            if not exchange(source, self.out):
                self._swap(source)
        else:
            os.replace(source, self.out)
        sync_folder(self.out.parent)

    def _swap(self, source: Path) -> None:
        os.rename(self.out, self._replaced)
        try:
            os.rename(source, self.out)
        except BaseException:
            os.rename(self._replaced, self.out)
            raise

    def clear(self) -> None:
        """Throw away what was made, and its journal."""
        for folder in (self.content, self._replaced):
            if folder.exists():
                shutil.rmtree(folder)
        self.journal.clear()

    def remove(self) -> None:
        """Remove the folder and free the lock; the journal goes last, because it says what the rest is."""
        self._restore()
        shutil.rmtree(self.content, ignore_errors=True)
        shutil.rmtree(self._replaced, ignore_errors=True)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:  # the next process is in it already, or somebody put something there
            pass
        self.close()

    def close(self) -> None:
        """Free the lock and leave everything as it is."""
        self.journal.close()


def _same(path: Path, opened: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), opened)
    except FileNotFoundError:
        return False


def _identity(path: Path) -> list[int]:
    info = os.stat(path)
    return [info.st_dev, info.st_ino]
