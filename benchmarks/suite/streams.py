"""The machine's memory at work without arithmetic: n streams read and one written, as a merge does (streams.cpp), and beside it torch's and
the C library's copies."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from pymerge.speed.ceiling import LARGEST, Ceiling
from pymerge.speed.rounds import Contender, interleave

__all__ = ["StreamCeiling", "bandwidths"]

SOURCE = Path(__file__).with_name("streams.cpp")
BUILT = Path(__file__).parents[2] / "build" / "benchmarks" / "streams.so"
MOST = 9
CACHED = 4 * 2**20
"""Outputs smaller than this are found in a cache by whoever reads them next, so they are not written past it."""


@functools.cache
def _library() -> ctypes.CDLL:
    """Compiled for this very CPU, when it is not there yet.

    Raises:
        OSError, subprocess.CalledProcessError: there is no C++ compiler, or it fails.
    """
    if not BUILT.exists() or BUILT.stat().st_mtime < SOURCE.stat().st_mtime:
        BUILT.parent.mkdir(parents=True, exist_ok=True)
        part = BUILT.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-o", str(part), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        part.replace(BUILT)
    library = ctypes.CDLL(str(BUILT))
    library.streams.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    library.streams.restype = None
    return library


class Streams:
    """`reads` streams into one (`writes`) or none, each of a share of `total_bytes`, at most :data:`LARGEST` bytes in all."""

    def __init__(self, total_bytes: int, reads: int, writes: bool = True) -> None:
        if reads > MOST:
            raise ValueError(f"{reads} streams; streams.cpp reads {MOST} at most")
        self.moved = min(total_bytes, LARGEST)
        self.scale = total_bytes / self.moved
        self._each = max(64, self.moved // (reads + writes) // 64 * 64)
        # 64 bytes of alignment is what torch gives every tensor.
        self._tensors = [torch.ones(self._each // 8, dtype=torch.int64) for _ in range(reads + writes)]
        self._inputs = (ctypes.c_void_p * max(reads, 1))(*(t.data_ptr() for t in self._tensors[:reads]))
        self._reads, self._out = reads, self._tensors[-1].data_ptr() if writes else None

    def __call__(self) -> None:
        _library().streams(self._inputs, self._reads, self._out, self._each, self._each >= CACHED, torch.get_num_threads())


class StreamCeiling:
    """The fastest way to move as many bytes as a merge must: its own number of streams, or one of :class:`Ceiling`'s copies.

    A way to move bytes that is tried is a way that a merge could be as fast as; so the more of them, the harder the ceiling.
    """

    def __init__(self, total_bytes: int, reads: int, writes: bool = True) -> None:
        self.total_bytes = total_bytes
        streams = Streams(total_bytes, min(reads, MOST), writes)
        self._scales, self.ways = {"streams": streams.scale}, {"streams": streams}
        self._copies = Ceiling(total_bytes) if writes else None
        if self._copies is not None:
            self.ways |= self._copies.ways()
            self._scales |= dict.fromkeys(self._copies.ways(), self._copies.scale)
        else:
            numbers = streams._tensors[0]
            self.ways["sum"], self._scales["sum"] = lambda: numbers.sum(), total_bytes / numbers.nbytes

    def scale(self, name: str) -> float:
        """What a time of that way is multiplied with, because it moved fewer bytes."""
        return self._scales[name]

    def close(self) -> None:
        if self._copies is not None:
            self._copies.close()


KINDS: dict[str, tuple[int, bool]] = {
    "read": (1, False), "write": (0, True), "copy": (1, True), "2 into 1": (2, True), "3 into 1": (3, True), "4 into 1": (4, True)
}  # fmt: skip


def bandwidths(sizes: list[int], threads: list[int], seconds: float, say: Callable[[str], None] = lambda line: None) -> list[dict]:
    """GB/s (read and written together) of each kind of streams, by total bytes and threads: median and fastest round."""
    rows, before = [], torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for size in sizes:
                runs = {kind: Streams(size, *shape) for kind, shape in KINDS.items()}
                times = interleave({kind: Contender(run, seconds) for kind, run in runs.items()}, 15)
                for kind, t in times.items():
                    row = {"kind": kind, "bytes": size, "threads": count}
                    rows.append(row | {"gb_per_s": size / t.median / 1e6, "best_gb_per_s": size / t.best / 1e6})
                del runs
                found = ", ".join(f"{r['kind']} {r['gb_per_s']:.1f}" for r in rows[-len(KINDS) :])
                say(f"{size / 2**20:6.0f} MiB, {count} threads: {found} GB/s")
    finally:
        torch.set_num_threads(before)
    return rows
