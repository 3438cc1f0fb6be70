"""What must not happen while an input is worked on: a hang, much memory, or a file opened that is none of the input's business."""

from __future__ import annotations

import os
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SECONDS = 20
"""Hundreds of times what the slowest input takes on a quiet machine."""

MEMORY_PER_BYTE, MEMORY, MEMORY_FOR_YAML = 120, 8_000_000, 100_000_000
"""An empty list takes 56 bytes and is written with 3, so parsed JSON may take dozens of bytes for each of the file's. Aliases make YAML
small for what it says; the parser stops at 200 000 values."""

RESIDENT = 64_000_000
"""By which the process may grow, for whatever reason: its allocators, torch's threads, modules that are imported."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Violation(AssertionError):
    """The input made pymerge do what it must not do."""


class _Watch:
    """Python cannot take an audit hook off again, so there is one, which is told what to look at."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.seen: list[str] = []
        # torch imports parts of itself when they are first wanted.
        self.always = (f"{os.path.realpath(os.path.dirname(torch.__file__))}{os.sep}",)
        self.writes = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if self.writes and event != "open":
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, flags = os.fsdecode(arguments[0]), arguments[2]
            real = os.path.realpath(path) if "\0" not in path else path
            if isinstance(flags, int) and flags & WRITES and not (self.writes and f"{real}{os.sep}".startswith(self.allowed)):
                self.seen.append(f"opened {path!r} for writing")
            elif self.allowed and not f"{real}{os.sep}".startswith(self.allowed + self.always):
                self.seen.append(f"opened {path!r}, which is {real!r}")
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.remove", "os.rename", "shutil.rmtree", "os.mkdir"):
            self.seen.append(event)


_watch: _Watch | None = None


@contextmanager
def guarded(size: int, inside: tuple[Path, ...], memory: int | None, writes: bool = False, resident: bool = False) -> Iterator[None]:
    """Raise :class:`Violation` for what the block did wrong.

    Args:
        size: of the input, in bytes.
        inside: folders in which files may be opened for reading; none for any.
        memory: bytes that may be taken besides some for each of the input's; None not to watch memory, which is slow.
        writes: files inside may be opened for writing, removed and renamed.
        resident: watch how much memory the process has, too.
    """
    global _watch
    if _watch is None:
        _watch = _Watch()

    def hangs(*_) -> None:
        raise Violation(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if memory is not None:
        tracemalloc.start()
    had = _reset_peak() if resident else 0
    _watch.seen.clear()
    _watch.writes = writes
    _watch.allowed = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in inside)
    try:
        yield
    finally:
        _watch.allowed = None
        grown = _peak() - had if resident and had else 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        peak = tracemalloc.get_traced_memory()[1] if memory is not None else 0
        tracemalloc.stop()
        if _watch.seen:
            raise Violation("; ".join(_watch.seen))
        if peak > (memory or 0) + MEMORY_PER_BYTE * size:
            raise Violation(f"{peak} bytes of memory for an input of {size} bytes")
        if grown > RESIDENT + 10 * size:
            raise Violation(f"the process grew by {grown} bytes for an input of {size} bytes")


def _reset_peak() -> int:
    """Bytes of memory that the process has now, from which the next peak is counted; 0 where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak()
    except OSError:
        return 0


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0
