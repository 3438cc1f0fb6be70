"""What an interrupted merge leaves, and how to go on."""

from __future__ import annotations

from pathlib import Path

__all__ = ["after_interruption"]


def after_interruption(recipe: Path, out: Path) -> str:
    """For whoever pressed Ctrl-C: what was kept and how to go on."""
    return f"nothing was kept, {out} is as it was before; to start over: pymerge merge {recipe} {out}"
