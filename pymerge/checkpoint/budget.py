"""How much memory a merge takes where nobody says, and how little it can do with."""

from __future__ import annotations

import os

__all__ = ["LEAST_MEMORY", "default_memory"]

LEAST_MEMORY = 64 * 2**20
"""The smallest budget: below it slices get so short that reading them is slow."""


def default_memory() -> int:
    """The budget where none is given: 4 GB, or a quarter of the machine's memory where that is less."""
    try:
        quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, OSError, ValueError):  # a system that does not say
        return 4 * 10**9
    return max(LEAST_MEMORY, min(4 * 10**9, quarter))
