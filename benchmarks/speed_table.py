"""The table of measured speeds, for the terminal and for Markdown, from the `extra_info` of a result file's benchmarks."""

from __future__ import annotations

import textwrap

HEADINGS = ("method", "elements", "dtype", "pymerge ms", "naive ms", "speed-up", "copy ms", "ratio to copy", "spread")


def cells(row: dict) -> tuple[str, ...]:
    return (
        row["method"],
        row["elements"],
        row["dtype"],
        f"{row['pymerge_ms']:.2f}",
        f"{row['naive_ms']:.1f}",
        f"{row['naive_ms'] / row['pymerge_ms']:.1f}x",
        f"{row['copy_ms']:.2f}",
        f"{row['pymerge_ms'] / row['copy_ms']:.2f}",
        f"{100 * row['spread']:.0f} %",
    )


def print_rows(rows: list[dict], machine: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Merge speed", title_justify="left", caption_justify="left", caption=legend(machine))
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i in (0, 2) else "right", no_wrap=True)
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or (rows[i + 1]["elements"], rows[i + 1]["dtype"]) != (row["elements"], row["dtype"])
        table.add_row(*cells(row), end_section=last)
    Console(width=120).print(table)


def markdown(rows: list[dict], machine: dict) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|--:|---|" + "--:|" * (len(HEADINGS) - 3)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", *textwrap.wrap(legend(machine), 138)])


def legend(machine: dict) -> str:
    wide = "AVX-512" if "avx512f" in machine["flags"] else "AVX2" if "avx2" in machine["flags"] else "no AVX2"
    return (
        f"Medians, {machine['cores']} cores of {machine['cpu']} ({wide}), torch {machine['torch']}. "
        "Three models (wise_ft, ema, slerp: one), density 0.2 for TIES, 0.5 for DARE. "
        "Naive: the paper's formula in torch, which allocates; pymerge writes into a given tensor. "
        "Copy: the fastest of three parallel copies that move the bytes a merge must move (each input read once, the output written "
        "once), timed in turn with the merge. Spread: interquartile range over median."
    )
