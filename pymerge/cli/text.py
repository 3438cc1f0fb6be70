"""Text from files, safe to print."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """`text` with control characters escaped: a tensor's name must not be able to move the cursor or clear the screen."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
