"""Results as lines, as a table in the terminal and as tables in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

__all__ = ["bandwidth_markdown", "legend", "line", "markdown", "print_result"]


def elements(n: int) -> str:
    """64M, 2.5M: in units of 2**20, as the sizes are chosen."""
    for unit, size in (("G", 2**30), ("M", 2**20), ("k", 2**10)):
        if n >= size:
            return f"{n / size:.0f}{unit}" if n % size == 0 or n >= 10 * size else f"{n / size:.1f}{unit}"
    return str(n)


def inputs(row: dict) -> str:
    n = elements(row["elements"])
    return n if row["layout"] == "one" else row["layout"] if "x" in row["layout"] else f"{row['layout']}: {row['tensors']} tensors, {n}"


def megabytes(n: int | None) -> str:
    return "?" if n is None else f"{n / 1e6:.0f}" if n >= 1e7 else f"{n / 1e6:.1f}"


def spread(values: Sequence[float]) -> str:
    """Median, and the quartiles in brackets."""
    digits = 2 if values[0] < 10 else 0
    return f"{values[0]:.{digits}f} ({values[1]:.{digits}f}-{values[2]:.{digits}f})"


def speedup(row: dict, *kinds: str, named: bool = False) -> str:
    """Over the faster rival of these kinds: 120x; with its name if asked for; empty where there is none, a dash where it gave no time."""
    found = [r for r in row["rivals"] if r["kind"] in kinds]
    timed = [r for r in found if "speedup" in r]
    if not timed:
        return "–" if found else ""
    best = min(timed, key=lambda r: r["ms"])
    factor = best["speedup"][0]
    return f"{factor:.{1 if factor < 10 else 0}f}x" + (f" ({best['rival']})" if named else "")


def ms(value: float) -> str:
    return f"{value:.{2 if value < 100 else 0}f}"


Column = tuple[str, Callable[[dict], str]]

COLUMNS: tuple[Column, ...] = (
    ("method", lambda r: r["method"]),
    ("inputs", inputs),
    ("dtype", lambda r: r["dtype"]),
    ("models", lambda r: str(r["models"])),
    ("density", lambda r: "" if r["density"] is None else f"{r['density']:g}"),
    ("threads", lambda r: str(r["threads"])),
    ("ms", lambda r: ms(r["ms"])),
    ("GB/s", lambda r: f"{r['gb_per_s']:.1f}"),
    ("x copy", lambda r: spread(r["to_copy"])),
    ("extra MB", lambda r: megabytes(r["extra_bytes"])),
    ("naive", lambda r: speedup(r, "naive")),
    ("torch", lambda r: speedup(r, "torch", "averaged")),
    ("mergekit", lambda r: speedup(r, "mergekit")),
    ("PEFT", lambda r: speedup(r, "peft")),
    ("x one tensor", lambda r: _to_one(r)),
)

# What the README has room for: of the full comparison, where inputs, models and threads are the same in all rows.
README_COLUMNS: tuple[Column, ...] = (
    ("method", lambda r: r["method"]),
    ("pymerge, ms", lambda r: ms(r["ms"])),
    ("GB/s", lambda r: f"{r['gb_per_s']:.1f}"),
    ("x copy", lambda r: spread(r["to_copy"])),
    ("extra MB", lambda r: megabytes(r["extra_bytes"])),
    ("faster than naive torch", lambda r: speedup(r, "naive")),
    ("best of torch", lambda r: speedup(r, "torch", "averaged", named=True)),
    ("mergekit", lambda r: speedup(r, "mergekit")),
    ("PEFT", lambda r: speedup(r, "peft")),
)


def _to_one(row: dict) -> str:
    one = next((r for r in row["rivals"] if r["kind"] == "one tensor"), None)
    return "" if one is None else f"{1 / one['speedup'][0]:.2f}"


def line(row: dict) -> str:
    """One row as it is measured."""
    kept = "" if row["density"] is None else f" d={row['density']:g}"
    rivals = ", ".join(f"{r['rival']} {r['speedup'][0]:.1f}x" for r in row["rivals"] if "speedup" in r)
    return (
        f"{row['method']}{kept} {inputs(row)} {row['dtype']} x{row['models']} {row['threads']} threads: {ms(row['ms'])} ms, "
        f"{row['gb_per_s']:.1f} GB/s, {spread(row['to_copy'])} x {row['copy_way']}; extra {megabytes(row['extra_bytes'])} MB"
        + (f"; {rivals}" if rivals else "")
        + f"; verified: {row['verified']} [{row['took_s']} s]"
    )


def print_result(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title_justify="left", caption_justify="left", caption=legend(result), title="Speeds")
    for heading, _ in COLUMNS:
        table.add_column(heading, justify="left" if heading in ("method", "inputs", "dtype") else "right", no_wrap=True)
    rows = result["rows"]
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1]["group"] != row["group"]
        table.add_row(*(cell(row) for _, cell in COLUMNS), end_section=last)
    Console(width=190).print(table)
    for text in _missing(rows):
        print(text)


def _missing(rows: list[dict]) -> list[str]:
    """Rivals without a time, and why, each once with how many rows that concerns."""
    reasons: dict[str, int] = {}
    for row in rows:
        for rival in row["rivals"]:
            if "skipped" in rival:
                text = f"{rival['rival']} has no time for {row['method']}: {rival['skipped']}"
                reasons[text] = reasons.get(text, 0) + 1
    return [text + (f" ({count} rows)" if count > 1 else "") for text, count in reasons.items()]


def _table(columns: Sequence[Column], rows: list[dict], left: int) -> list[str]:
    cells = [[cell(row) for _, cell in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    head = [columns[i][0] for i in used]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" if i < left else "--:" for i in used) + "|"]
    return lines + ["| " + " | ".join(row[i] for i in used) + " |" for row in cells]


def markdown(rows: list[dict], readme: bool = False) -> str:
    """A table without the columns that are empty in all rows."""
    return "\n".join(_table(README_COLUMNS if readme else COLUMNS, rows, 1 if readme else 3))


def bandwidth_markdown(rows: list[dict]) -> str:
    """GB/s by kind of streams, a line for each size and number of threads."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = ["| moved | threads | " + " | ".join(kinds) + " |", "|--:|--:|" + "--:|" * len(kinds)]
    by = {(row["bytes"], row["threads"], row["kind"]): row for row in rows}
    for size, threads in dict.fromkeys((row["bytes"], row["threads"]) for row in rows):
        cells = [f"{by[size, threads, kind]['gb_per_s']:.1f}" for kind in kinds]
        lines.append(f"| {size / 2**20:.0f} MiB | {threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def legend(result: dict) -> str:
    machine, rivals = result["machine"], result["rivals"]
    others = ", ".join(f"{name} {rivals[name]}" for name in ("mergekit", "peft") if rivals.get(name))
    text = (
        f"{machine['cores']} cores of {machine['cpu']} ({machine['isa']}), torch {machine['torch']}{', ' + others if others else ''}, "
        f"{result['date']}, commit {result['commit']}. Medians; in brackets the quartiles. GB/s: inputs read once and output written once. "
        "x copy: the time over that of the fastest parallel way to move those bytes, in turn with it. extra MB: memory beside "
        "inputs and output. Then how many times faster than others, in turn too. Every result is verified before it is timed."
    )
    return "\n".join(textwrap.wrap(text, 138))
