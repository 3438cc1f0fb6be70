"""What a merge that had begun can fail with, besides what is wrong with the files."""

from __future__ import annotations

__all__ = ["DeviceError", "MergeError"]


class MergeError(RuntimeError):
    """A merge failed after it had begun. Nothing was left at the output's name."""


class DeviceError(MergeError):
    """A device failed, or its memory was not enough. What was done before stays in OUT.partial, to be continued on any device."""
