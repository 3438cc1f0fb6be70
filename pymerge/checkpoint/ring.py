"""Memory for tensors on their way: taken and given back in the same order, touched for the first time once."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Ring", "Stopped", "aligned"]

ALIGNMENT = 64


class Stopped(Exception):
    """The ring was stopped while somebody waited, or before."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment of pieces."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _touched_once(capacity: int) -> mmap.mmap:
    """Fresh memory costs a page fault per 4 KiB, as much time as reading the data into it; this memory is faulted in once, in huge pages
    where the system has them."""
    memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return memory


class Ring:
    """A block of `capacity` bytes, cut into contiguous pieces for one thread that takes and another that releases, first in first out.

    Args:
        capacity: bytes.
        allocate: gives that many bytes as a tensor; by default they are the host's.

    Attributes:
        memory: the block's bytes.
        view: the same, of the host's memory.
    """

    def __init__(self, capacity: int, allocate: Callable[[int], Tensor] | None = None) -> None:
        self.capacity = max(aligned(capacity), ALIGNMENT)
        if allocate is None:
            self.view = memoryview(_touched_once(self.capacity))
            self.memory = torch.frombuffer(self.view, dtype=torch.uint8)
        else:
            self.memory = allocate(self.capacity)
        self._pieces: deque[tuple[int, int]] = deque()
        self._changed = threading.Condition()
        self._stopped = False

    def take(self, nbytes: int) -> int:
        """Where a piece of `nbytes` begins, once there is room.

        Raises:
            Stopped: somebody called :meth:`stop`.
            ValueError: more than the capacity.
        """
        size = max(aligned(nbytes), ALIGNMENT)
        if size > self.capacity:
            raise ValueError(f"{nbytes} bytes asked of a ring of {self.capacity}")
        with self._changed:
            while True:
                if self._stopped:
                    raise Stopped
                start = self._place(size)
                if start is not None:
                    self._pieces.append((start, start + size))
                    return start
                self._changed.wait()

    def _place(self, size: int) -> int | None:
        if not self._pieces:
            return 0
        first, last = self._pieces[0][0], self._pieces[-1][1]
        if last > first:  # in use: [first, last)
            if last + size <= self.capacity:
                return last
            return 0 if size <= first else None
        return last if last + size <= first else None  # in use: [first, end of a piece) and [0, last)

    def release(self) -> None:
        """Give back the piece taken longest ago."""
        with self._changed:
            self._pieces.popleft()
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake up whoever waits, for good."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
