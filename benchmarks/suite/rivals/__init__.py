"""The same merges by others, a file each; optional packages are imported when their rival is asked for.

A rival is a program without arguments that gives a merged tensor, or state dict. Each module has ``rivals(method, inputs, density)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from ..inputs import Inputs

__all__ = ["KINDS", "Missing", "Rival", "rivals_of"]


@dataclass(frozen=True)
class Rival:
    """One program.

    Attributes:
        label: what it is, in the report.
        run: gives the result.
        bytes_per_element: memory that it needs beside its inputs, an estimate on the safe side; it is not tried where that is not there.
        random: it drops other elements than pymerge, so that only the size of its merged delta can be compared.
        least: fraction of elements that have to agree (see verify.agreement).
        prepare: called once before the run whose result is compared: what has to be compiled first, or put back to its start.
    """

    label: str
    run: Callable[[], object]
    bytes_per_element: int
    random: bool = False
    least: float = 0.999
    prepare: Callable[[], None] | None = None


class Missing(Exception):
    """A rival that cannot run here, and why."""


KINDS = {"naive": "naive", "torch": "best_torch", "mergekit": "of_mergekit", "peft": "of_peft", "averaged": "averaged_model"}
"""Rivals by the name that a plan gives them, and their module here."""


def rivals_of(kind: str, method: str, inputs: Inputs, density: float) -> list[Rival]:
    """The rival programs of one kind: the fastest of them counts. None where it has no such method.

    Raises:
        Missing: what it needs is not installed.
    """
    try:
        module = import_module(f".{KINDS[kind]}", __name__)
    except ImportError as error:
        raise Missing(f"{error.name or error} is not installed") from None
    return module.rivals(method, inputs, density)
