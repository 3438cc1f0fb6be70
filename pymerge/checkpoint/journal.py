"""What an unfinished output holds for certain: a file of JSON lines that only grows."""

from __future__ import annotations

import json
import os
from typing import Any

__all__ = ["Journal", "datasync"]

datasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class Journal:
    """Records on disk. One counts once its whole line is there: what a power cut left of another is cut off.

    Args:
        fd: of the file, opened for reading and appending; closed by :meth:`close`.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._end: int | None = None

    def load(self) -> list[dict[str, Any]]:
        """All records, up to the first that is damaged; the next append replaces everything from there on."""
        raw = b""
        while piece := os.pread(self.fd, 2**20, len(raw)):
            raw += piece
        records, valid = [], 0
        for line in raw.split(b"\n")[:-1]:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict):
                break
            records.append(record)
            valid += len(line) + 1
        self._end = valid if valid < len(raw) else None
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a record. It is on the disk when this returns, so what it speaks of must be there before."""
        if self._end is not None:
            os.ftruncate(self.fd, self._end)
            self._end = None
        line = memoryview(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        before = os.fstat(self.fd).st_size
        try:
            while len(line):
                line = line[os.write(self.fd, line) :]
            datasync(self.fd)
        except OSError:  # the disk is full, say: a part of a line must not become the beginning of the next
            self._end = before
            raise

    def clear(self) -> None:
        """Forget everything."""
        self._end = None
        os.ftruncate(self.fd, 0)
        datasync(self.fd)

    def close(self) -> None:
        """Close the file, which frees its lock."""
        os.close(self.fd)
