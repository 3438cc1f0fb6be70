"""The files that a merge reads: are they still what they were, and what are their SHA-256?"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .format import CheckpointError, InputChangedError, open_regular
from .store import TensorStore

__all__ = ["Hashes", "InputFiles", "sha256_of"]

BLOCK = 2**22


class InputFiles:
    """What the files of some stores were when this was made.

    Attributes:
        identities: file -> (size, mtime in ns, inode), in the order of the stores.

    Raises:
        CheckpointError: one cannot be looked at.
    """

    def __init__(self, stores: Iterable[TensorStore]) -> None:
        self.identities: dict[Path, tuple[int, int, int]] = {file: _identity(file) for store in stores for file in store.files}

    def check(self) -> None:
        """
        Raises:
            InputChangedError: a file is no longer what it was.
        """
        for file, (size, mtime, inode) in self.identities.items():
            now = _identity(file)
            if now == (size, mtime, inode):
                continue
            what = (
                f"it had {size} bytes and has {now[0]}" if now[0] != size
                else "it was written to" if now[1] != mtime
                else "another file took its place"
            )  # fmt: skip
            raise InputChangedError(f"{file}: changed during the merge: {what}; nothing was written. Merge again when it stays as it is")


def _identity(file: Path) -> tuple[int, int, int]:
    try:
        info = os.stat(file)
    except OSError as error:
        raise InputChangedError(f"{file}: cannot be found any more: {error.strerror}") from None
    return info.st_size, info.st_mtime_ns, info.st_ino


class Hashes:
    """SHA-256 of files, computed in a thread beside the merge: the tensors pass through in an order of their own, from several threads, so
    the hashes need each file read once more, mostly from the page cache.

    Args:
        files: what to hash; none for no hashes.
        expected: hashes that are known of an earlier run, by path as text.
        record: called with a path and its hash when it is known.
    """

    def __init__(self, files: Iterable[Path], expected: Mapping[str, str], record: Callable[[str, str], None]) -> None:
        self._files = list(files)
        self._expected = expected
        self._record = record
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._futures: dict[Path, Future[str]] = {}

    def __enter__(self) -> Hashes:
        if self._files:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="pymerge-hash")
            self._futures = {file: self._pool.submit(self._hash, file) for file in self._files}
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def result(self) -> dict[Path, str]:
        """All of them, when they are done.

        Raises:
            InputChangedError: one is not what was expected.
            CheckpointError: a file cannot be read.
        """
        return {file: future.result() for file, future in self._futures.items()}

    def _hash(self, file: Path) -> str:
        found = sha256_of(file, self._stop)
        expected = (("an earlier run of this merge", self._expected.get(str(file))), ("its name in the cache", _from_cache(file)))
        for origin, known in expected:
            if known not in (None, found):
                raise InputChangedError(f"{file}: its SHA-256 is {found}, but {origin} says {known}; its content is not what it was")
        self._record(str(file), found)
        return found


def sha256_of(file: Path, stop: threading.Event | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
        CheckpointError: it cannot be read, or `stop` was set.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    fd, _ = open_regular(file)
    try:
        while count := os.readv(fd, [block]):
            if stop is not None and stop.is_set():
                raise CheckpointError(f"{file}: hashing was stopped")
            digest.update(block[:count])
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)
    return digest.hexdigest()


def _from_cache(file: Path) -> str | None:
    """The Hugging Face cache names large files by their SHA-256: models--org--name/blobs/<64 digits>, with links to them."""
    real = file.resolve()
    return real.name if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name) else None
