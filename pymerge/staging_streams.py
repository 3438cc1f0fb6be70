"""Streams of a device and pinned blocks of host memory, for :mod:`pymerge.staging`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Blocks", "free_bytes", "make_streams"]


class NoStream:
    """What a device that does one thing after the other needs: everything is done when it is asked for."""

    def allocate(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record_event(self) -> NoStream:
        return self

    def wait_event(self, event) -> None: ...

    def synchronize(self) -> None: ...


class CudaStream(torch.cuda.Stream):
    def allocate(self, size: int, device: torch.device) -> Tensor:
        with torch.cuda.stream(self):
            return torch.empty(size, dtype=torch.uint8, device=device)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self):
            work()


def make_streams(device: torch.device) -> tuple:
    """Streams for copies in, for kernels and for copies out."""
    return tuple(CudaStream(device) if device.type == "cuda" else NoStream() for _ in range(3))


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be allocated on `device`; None where nobody counts."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


class Blocks:
    """Two blocks of host memory, pinned for a GPU, used in turns."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]
        self._ends: list[Callable[[], None] | None] = [None, None]
        self._turn = 0

    def next(self) -> Tensor:
        """A block whose last use has ended."""
        self._turn = 1 - self._turn
        self._end()
        return self._blocks[self._turn]

    def until(self, end: Callable[[], None]) -> None:
        """The block given last is in use; `end` waits for that, and does what is left to do with its contents."""
        self._ends[self._turn] = end

    def _end(self) -> None:
        end, self._ends[self._turn] = self._ends[self._turn], None
        if end is not None:
            end()

    def drain(self) -> None:
        for _ in self._blocks:
            self.next()
