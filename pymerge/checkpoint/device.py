"""A device on which files are merged: copies to it, kernels and copies back go on at the same time, with bounded memory there.

Pieces are read into pinned memory, so that the device copies them by itself, and come back into such memory, from which they are written.
On the device lie two rings as on the host, one for inputs and one for results. Each step waits for its own stream before it hands a job on
and gives its room back, so nothing is overwritten or written to the disk before its copy is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..staging_streams import free_bytes, make_streams, pinned, usable
from .budget import default_memory
from .failures import DeviceError, MergeError
from .ring import Ring
from .sizes import format_bytes

if TYPE_CHECKING:
    from .memory import Buffers

__all__ = ["Device", "Route", "choose_device", "device_errors", "route"]

SPARE = 0.9
"""How much of a device's free memory is taken at most, where nothing else is asked for."""


@dataclass(frozen=True)
class Device:
    """Where pieces are merged, if that is not the CPU.

    Attributes:
        device: torch's.
        memory: bytes there for tensors on their way and for what a method needs besides.
    """

    device: torch.device
    memory: int

    @property
    def backend(self) -> str:
        """That merges there."""
        return ops.backend_name(self.device)

    @property
    def title(self) -> str:
        """For people: "cuda:0 (NVIDIA H100)"."""
        return f"{self.device} ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else str(self.device)


def choose_device(device: torch.device | str | None, device_memory: int | None, memory: int | None) -> Device | None:
    """The device of that name, None for the CPU.

    Args:
        device: None or "cpu" for the CPU, "cuda", "cuda:1".
        device_memory: bytes to use there; by default as many as `memory`, but no more than are free.
        memory: the budget in the host's memory, if one is given.

    Raises:
        ValueError: there is no such device here, it has less memory free than asked for, or a budget is given for the CPU.
    """
    if device is None or str(device) == "cpu":
        if device_memory is not None:
            raise ValueError("device_memory is the budget on a device; name one (device='cuda') or leave it out")
        return None
    found = usable(device)
    free = free_bytes(found)
    if device_memory is None:
        device_memory = memory or default_memory()
        if free is not None:
            device_memory = min(device_memory, int(SPARE * free))
    elif free is not None and device_memory > free:
        raise ValueError(f"device_memory is {format_bytes(device_memory)}, and {format_bytes(free)} are free on {found}; ask for less")
    return Device(found, device_memory)


@contextmanager
def device_errors(device: torch.device, doing: str) -> Iterator[None]:
    """What goes wrong on the device in this block, as an error that says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise DeviceError(f"{doing}: there is not enough memory on {device}; {_room(device)}{_ADVICE}") from None
    except MergeError:
        raise
    except RuntimeError as error:
        raise DeviceError(f"{doing}: {device} failed: {error}") from error


_ADVICE = "give a smaller --device-memory (device_memory=), so that more is merged in slices, or leave --device out to merge on the CPU"


def _room(device: torch.device) -> str:
    free = free_bytes(device)
    return "" if free is None else f"{format_bytes(free)} are free now; "


class Route:
    """The way of a merge's pieces over a device, while the block of :func:`route` runs.

    Attributes:
        device: torch's.
        inputs, outputs: rings on the device.
        compute: the stream of the kernels.
    """

    def __init__(self, device: torch.device, buffers: Buffers) -> None:
        self.device = device
        self._copy_in, self.compute, self._copy_out = make_streams(device)
        with device_errors(device, f"{format_bytes(buffers.total)} for tensors on their way"):
            self.inputs, self.outputs = (
                Ring(size, lambda capacity: self.compute.allocate(capacity, device)) for size in (buffers.inputs, buffers.outputs)
            )

    def upload(self, to: Tensor, source: Tensor) -> None:
        """Copy pinned memory to the device; it has arrived when this returns."""
        self._copy(self._copy_in, to, source, "copying inputs to it")

    def download(self, to: Tensor, source: Tensor) -> None:
        """Copy results into pinned memory; they have arrived when this returns."""
        self._copy(self._copy_out, to, source, "copying results from it")

    def _copy(self, stream, to: Tensor, source: Tensor, what: str) -> None:
        with device_errors(self.device, what):
            stream.run(lambda: to.copy_(source, non_blocking=True))
            stream.synchronize()

    def run(self, work: Callable[[], None]) -> None:
        """Do `work`, which launches kernels; they are done when this returns."""
        with device_errors(self.device, "merging"):
            self.compute.run(work)
            self.compute.synchronize()

    def close(self) -> None:
        """Wait for everything: after an error copies may still be under way, from and to memory that is given back next."""
        for stream in (self._copy_in, self.compute, self._copy_out):
            with suppress(RuntimeError):  # of a device that has failed, which has been said
                stream.synchronize()


@contextmanager
def route(device: Device, buffers: Buffers, host: tuple[Ring, Ring]) -> Iterator[Route]:
    """Pins the host's rings and takes memory on the device.

    Raises:
        DeviceError: the memory cannot be had.
    """
    with ExitStack() as stack:
        for ring in host:
            with device_errors(device.device, "copies need pinned memory; a smaller --memory (memory=) needs less of it"):
                stack.enter_context(pinned(ring.memory, device.device))
        way = Route(device.device, buffers)
        stack.callback(way.close)
        way.compute.synchronize()  # what had this memory before may still be under way there
        yield way
