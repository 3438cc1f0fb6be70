"""How much memory a merge takes where nobody says, and how little it can do with."""

from __future__ import annotations

import os

from .available import memory_left

__all__ = ["LEAST_MEMORY", "default_memory"]

LEAST_MEMORY = 64 * 2**20
"""The smallest budget: below it slices get so short that reading them is slow."""

MOST_BY_DEFAULT = 4 * 10**9
"""The budget where none is given, at most. More makes nothing faster but methods that need whole tensors of gigabytes."""


def default_memory() -> int:
    """The budget where none is given: 4 GB, or a quarter of the machine's memory or of what a container's limit leaves, if that is less."""
    there = [MOST_BY_DEFAULT * 4]
    try:
        there.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # a system that does not say
        pass
    left = memory_left()
    if left is not None:
        there.append(left)
    return max(LEAST_MEMORY, min(there) // 4)
