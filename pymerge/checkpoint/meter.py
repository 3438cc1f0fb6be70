"""How long each stage of a merge was at work: what tells which of them sets the pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STAGES", "Meter"]

STAGES = ("reading", "uploading", "merging", "downloading", "writing")
"""In the order in which tensors pass them; those in the middle copy to a device and back, if there is one."""


class Meter:
    """Bytes and busy seconds by stage. Stages run side by side, so the one that was busy longest is the one the others wait for.

    Reading's rate is what the disk (or the page cache) gave while it was asked; writing's includes flushing to the disk.

    Attributes:
        stages: that the merge has.
        bytes, seconds: by stage.
        before: bytes that an earlier run had read and written, so that this one need not.
    """

    def __init__(self) -> None:
        self.stages = ("reading", "merging", "writing")
        self.bytes = dict.fromkeys(STAGES, 0)
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.before = 0
        self._lock = threading.Lock()

    @contextmanager
    def at_work(self, stage: str, nbytes: int = 0) -> Iterator[None]:
        """The stage works inside this block, on `nbytes`; one thread per stage at a time."""
        began = time.perf_counter()
        yield
        with self._lock:
            self.seconds[stage] += time.perf_counter() - began
            self.bytes[stage] += nbytes

    def rate(self, stage: str) -> float:
        """Bytes per second of the stage's own time; 0 before it did anything."""
        return self.bytes[stage] / self.seconds[stage] if self.seconds[stage] > 0 else 0.0

    def slowest(self) -> str | None:
        """The stage that was busy longest so far, None before any was."""
        stage = max(self.stages, key=lambda s: self.seconds[s])
        return stage if self.seconds[stage] > 0 else None
