"""How much memory a call takes at its peak (Linux: the kernel's high-water mark of this process)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["available_bytes", "extra_bytes"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kilobytes(field: str) -> int:
    return int(re.search(rf"^{field}:\s*(\d+)", _STATUS.read_text(), re.MULTILINE).group(1))


def extra_bytes(run: Callable[[], object]) -> int | None:
    """Most bytes resident while `run` runs, over those before it; None where the system does not tell.

    Memory that earlier calls keep for later ones counts for the call that takes it first.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but is still mapped would hide that much of the peak
        before = _kilobytes("VmRSS")
        _CLEAR.write_text("5")  # sets the high-water mark back
    except (OSError, AttributeError):
        run()
        return None
    run()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def available_bytes() -> int:
    """Memory that can still be had without swapping; 0 where the system does not tell."""
    path = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s*(\d+)", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found.group(1)) * 1024 if found else 0
