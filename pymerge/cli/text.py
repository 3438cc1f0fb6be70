"""What commands print: JSON, tables, and text from files made safe."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

__all__ = ["count", "heading", "number", "print_json", "printable", "table"]


def printable(text: str) -> str:
    """`text` with control characters escaped: a tensor's name must not be able to move the cursor or clear the screen."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_json(schema: str, content: dict[str, Any]) -> None:
    """One JSON object on stdout, whose first key says what it is ("plan/2"); NaN and infinities, which JSON lacks, become null."""
    click.echo(json.dumps(_finite({"schema": schema, **content}), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count(n: int, thing: str) -> str:
    """ "1 file", "2 files"."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def number(value: float) -> str:
    """Three digits: "0.0502", "1.2e-05"; "inf" and "nan" as they are."""
    return f"{value:.3g}"


def heading(text: str) -> str:
    """In bold on a terminal; click removes that where output goes elsewhere."""
    return text if "NO_COLOR" in os.environ else click.style(text, bold=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print aligned columns, the first `left` flush left and the others right.

    On a terminal the first column is cut in its middle where lines would be too long; in a pipe nothing is cut.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *rows]) for i in range(len(head))]
    if sys.stdout.isatty():
        spare = shutil.get_terminal_size().columns - sum(widths) - 2 * (len(widths) - 1)
        widths[0] = max(min(widths[0], 12), widths[0] + min(0, spare))
    for i, row in enumerate([head, *rows]):
        cells = [_cut(row[0], widths[0]), *row[1:]]
        aligned = [cell.ljust(w) if j < left else cell.rjust(w) for j, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        line = "  ".join(aligned).rstrip()
        click.echo(line if i else heading(line))


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    front = (width - 1) // 2
    return f"{text[:front]}…{text[len(text) - (width - 1 - front) :]}"
