"""Streams of a device and pinned host memory, for :mod:`pymerge.staging` and the merge of files (:mod:`pymerge.checkpoint.device`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import ops

__all__ = ["Blocks", "free_bytes", "make_streams", "pinned", "usable"]


def usable(device: torch.device | str) -> torch.device:
    """`device` with its index.

    Raises:
        ValueError: there is no such device here, or the backend that is insisted on cannot use it.
    """
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; choose a GPU ('cuda', 'cuda:1', with ROCm too) or 'cpu'") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {str(device)!r}, and torch sees no GPU here; leave it out to merge on the CPU")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device is {str(device)!r}, and there are {torch.cuda.device_count()} GPUs, counted from 0")
    elif device.type != "cpu":
        raise ValueError(f"device is {str(device)!r}; choose a GPU ('cuda', 'cuda:1', with ROCm too) or 'cpu'")
    ops.require_backend(device)
    return device


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


@contextmanager
def pinned(memory: Tensor, device: torch.device) -> Iterator[None]:
    """Host memory that `device` copies from and to by itself, while this block runs; no copy may be under way when it ends.

    Memory that is there already is registered: torch's own pinned memory comes in powers of two, up to twice as much as a budget allows.

    Raises:
        RuntimeError: the system does not let it.
    """
    if device.type != "cuda" or memory.numel() == 0:
        yield
        return
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 1))  # 1: for every context
        if code != 0:
            raise RuntimeError(f"{memory.numel()} bytes of host memory cannot be pinned for {device} (cudaHostRegister gave {code})")
    try:
        yield
    finally:
        with torch.cuda.device(device):
            runtime.cudaHostUnregister(memory.data_ptr())


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
