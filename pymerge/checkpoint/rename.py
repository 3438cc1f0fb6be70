"""Renaming that survives a power cut, and that never leaves a name without a folder where the system can do that."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

__all__ = ["exchange", "sync_folder"]

AT_FDCWD = -100
RENAME_EXCHANGE = 2

_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
"""What a kernel or a filesystem (NFS, FUSE, some overlays) answers that has no such operation."""


def exchange(a: Path, b: Path) -> bool:
    """Swap what two names mean, in one step. False where the system cannot; nothing has happened then.

    Raises:
        OSError: it can, and failed.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or a C library without it
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
