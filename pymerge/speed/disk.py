"""How fast a folder's disk writes and reads."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DiskRates", "disk_rates"]

CHUNK = 16 * 2**20
THREADS = 4
"""As a merge reads."""


@dataclass(frozen=True)
class DiskRates:
    """Bytes per second.

    Attributes:
        bytes: of the file.
        write: with the flush to the disk that makes it last.
        read: after the kernel was asked to forget the file.
        read_again: out of the page cache, where there is one.
        cold: False when reading was about as fast as reading again: the file was not forgotten then, and `read` is not the disk's.
    """

    bytes: int
    write: float
    read: float
    read_again: float

    @property
    def cold(self) -> bool:
        return self.read < 0.67 * self.read_again


def disk_rates(folder: str | os.PathLike, nbytes: int = 2**30) -> DiskRates:
    """Write a file of `nbytes` random bytes into `folder`, read it twice, delete it.

    Raises:
        OSError: the folder does not exist, is not writable, or has less than twice as much room.
    """
    folder = Path(folder)
    free = shutil.disk_usage(folder).free
    if free < 2 * nbytes:
        raise OSError(f"{folder}: a file of {nbytes} bytes is not written where {free} are free; choose a smaller --disk-size")
    path = folder / f".pymerge-bench-{secrets.token_hex(4)}"
    block = os.urandom(CHUNK)  # a disk that compresses would make too much of zeros
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        starts = range(0, nbytes, CHUNK)
        write = _timed(lambda: (_each(starts, lambda i: os.pwrite(fd, block[: nbytes - i], i)), os.fsync(fd)))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        buffers = [bytearray(CHUNK) for _ in range(THREADS)]

        def read() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda t: _each(starts[t::THREADS], lambda i: os.preadv(fd, [buffers[t]], i)), range(THREADS)))

        return DiskRates(nbytes, *(nbytes / seconds for seconds in (write, _timed(read), min(_timed(read), _timed(read)))))
    finally:
        os.close(fd)
        path.unlink()


def _each(starts, work) -> None:
    for start in starts:
        work(start)


def _timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
