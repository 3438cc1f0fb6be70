"""What an unfinished output holds for certain: a file of JSON lines that only grows.

Every line ends with a check that follows from it and all lines before it, so a line that was changed, moved, left out or put in ends what
is believed. (Lines that are missing at the end only make work be done again.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

__all__ = ["Journal", "datasync"]

_CHECK = re.compile(rb',"check":"([0-9a-f]{16})"\}')

datasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync

LENGTH = len(',"check":"0123456789abcdef"}')


def _next(chain: bytes, body: bytes) -> bytes:
    return hashlib.sha256(chain + body).digest()


class Journal:
    """Records on disk, which are not empty. One counts once its whole line is there: what a power cut left of another is cut off.

    Args:
        fd: of the file, opened for reading and appending; closed by :meth:`close`.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._end: int | None = None
        self._chain = b""

    def load(self) -> list[dict[str, Any]]:
        """All records, up to the first that is damaged; the next append replaces everything from there on."""
        raw = b""
        while piece := os.pread(self.fd, 2**20, len(raw)):
            raw += piece
        records, valid = [], 0
        self._chain = b""
        for line in raw.split(b"\n")[:-1]:
            body, check = line[:-LENGTH], _CHECK.fullmatch(line[-LENGTH:])
            chain = _next(self._chain, body)
            if check is None or check[1] != chain.hex()[:16].encode():
                break
            records.append(json.loads(body + b"}"))
            self._chain = chain
            valid += len(line) + 1
        self._end = valid if valid < len(raw) else None
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a record. It is on the disk when this returns, so what it speaks of must be there before."""
        if self._end is not None:
            os.ftruncate(self.fd, self._end)
            self._end = None
        body = json.dumps(record, separators=(",", ":")).encode()[:-1]
        chain = _next(self._chain, body)
        line = memoryview(body + f',"check":"{chain.hex()[:16]}"}}\n'.encode())
        before = os.fstat(self.fd).st_size
        try:
            while len(line):
                line = line[os.write(self.fd, line) :]
            datasync(self.fd)
        except OSError:  # the disk is full, say: a part of a line must not become the beginning of the next
            self._end = before
            raise
        self._chain = chain

    def clear(self) -> None:
        """Forget everything."""
        self._end, self._chain = None, b""
        os.ftruncate(self.fd, 0)
        datasync(self.fd)

    def close(self) -> None:
        """Close the file, which frees its lock."""
        os.close(self.fd)
