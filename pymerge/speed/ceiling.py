"""How long the machine needs to move a number of bytes: the least time a merge that is bound by memory can take."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["Ceiling", "elapsed_ms", "memory_rates"]


def elapsed_ms(run: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - started) / 1e6


LARGEST = 2**31
"""Bytes that are moved at most: beyond this, time grows with size, so it is scaled up, and the memory is left to what is measured."""


class Ceiling:
    """Three ways to move `total_bytes` (reads and writes together) with all threads; the fastest is the ceiling.

    * ``copy_``: torch's own copy of half as many bytes.
    * ``memmove``: the C library's, a slice per thread; it streams past the caches when the copy is large.
    * ``xor``: two streams into a third, each of a third of the bytes, for machines that read faster than they write.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.scale = max(1.0, total_bytes / LARGEST)
        self._bytes = torch.ones(max(48, min(total_bytes, LARGEST) // 48 * 48), dtype=torch.uint8)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        self._ways = {"copy_": self._copy, "memmove": self._memmove, "xor": self._xor}
        self._times: dict[str, list[float]] = {name: [] for name in self._ways}

    def _copy(self) -> None:
        source, target = self._bytes.view(torch.int64).chunk(2)
        target.copy_(source)

    def _memmove(self) -> None:
        source, target = self._bytes.chunk(2)
        threads = torch.get_num_threads()
        edges = [i * source.numel() // threads for i in range(threads + 1)]

        def move(i: int) -> None:
            ctypes.memmove(target.data_ptr() + edges[i], source.data_ptr() + edges[i], edges[i + 1] - edges[i])

        list(self._pool.map(move, range(threads)))

    def _xor(self) -> None:
        a, b, target = self._bytes.view(torch.int64).chunk(3)
        torch.bitwise_xor(a, b, out=target)

    def round(self) -> None:
        """Time each way once, after a run that is not timed: what fits into a cache is there, as it is when a merge is timed."""
        for name, run in self._ways.items():
            run()
            self._times[name].append(elapsed_ms(run))

    def milliseconds(self) -> tuple[str, float]:
        """The fastest way and its median time."""
        medians = {name: torch.tensor(times).median().item() for name, times in self._times.items()}
        best = min(medians, key=medians.__getitem__)
        return best, self.scale * medians[best]

    def ways(self) -> dict[str, Callable[[], None]]:
        """What moves the bytes, by name; when :data:`LARGEST` is less, its time counts `scale` times."""
        return dict(self._ways)

    def close(self) -> None:
        self._pool.shutdown()


def memory_rates(nbytes: int = 2**28, rounds: int = 5) -> tuple[float, float]:
    """Bytes per second that this machine copies (read and written counted together) and reads, with all threads.

    Args:
        nbytes: to move: more than the caches hold.
        rounds: the median counts.
    """
    ceiling, times = Ceiling(nbytes), []
    try:
        numbers = torch.ones(nbytes // 8, dtype=torch.int64)
        for _ in range(rounds):
            ceiling.round()
            times.append(elapsed_ms(numbers.sum))
        return 1e3 * nbytes / ceiling.milliseconds()[1], 1e3 * nbytes / torch.tensor(times).median().item()
    finally:
        ceiling.close()
