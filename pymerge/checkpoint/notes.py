"""What an error is told on its way to people: which file, what was kept, how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["add_note", "naming"]


def add_note(error: BaseException, note: str) -> None:
    """What ``BaseException.add_note`` of Python 3.11 does."""
    error.__notes__ = [*getattr(error, "__notes__", ()), note]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of calls that know a file by its descriptor alone get its name: people need to know which disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
