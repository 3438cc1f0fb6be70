"""The command `pymerge`."""

from .main import main

__all__ = ["main"]
