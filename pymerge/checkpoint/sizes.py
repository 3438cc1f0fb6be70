"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {
    "": 1, "B": 1, "K": 10**3, "KB": 10**3, "KIB": 2**10, "M": 10**6, "MB": 10**6, "MIB": 2**20,
    "G": 10**9, "GB": 10**9, "GIB": 2**30, "T": 10**12, "TB": 10**12, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(size: int | str) -> int:
    """5000000000 from 5000000000, "5GB" or "5e9"; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Raises:
        ValueError: it is no size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d{1,2})?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or isinstance(size, bool):
        raise ValueError(f"{size!r} is not a size; write a number of bytes or one with a unit, such as 5GB or 512MiB")
    count = int(float(match.group(1)) * unit)
    if count < 1:
        raise ValueError(f"{size!r} is less than a byte")
    return count


def format_bytes(count: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
