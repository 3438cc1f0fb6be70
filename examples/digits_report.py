"""The demo's result: one table on the terminal, the same table as a picture, and what the numbers say."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    group: str  # "base", "expert" or "merge"
    name: str
    accuracy: list[float]  # percent, one per domain

    @property
    def mean(self) -> float:
        return mean(self.accuracy)


def print_table(rows: list[Row], domains: tuple[str, ...], console: Console) -> None:
    table = Table(title="Test accuracy in percent, by domain", title_justify="left")
    table.add_column("model")
    for heading in (*domains, "mean"):
        table.add_column(heading, justify="right")
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1].group != row.group
        table.add_row(row.name, *(f"{value:.1f}" for value in (*row.accuracy, row.mean)), end_section=last)
    console.print(table)


def write_picture(rows: list[Row], domains: tuple[str, ...], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = [[*row.accuracy, row.mean] for row in rows]
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(rows) + 1.2), layout="constrained")
    axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="black" if value > 60 else "white", fontsize=9)
    for y in range(1, len(rows)):
        if rows[y].group != rows[y - 1].group:
            axes.axhline(y - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(domains) + 1), [*domains, "mean"])
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_title("Test accuracy in percent, by domain")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def findings(rows: list[Row], domains: tuple[str, ...]) -> list[str]:
    """What the table shows, in words made from its numbers alone."""
    base = next(row for row in rows if row.group == "base")
    experts = [row for row in rows if row.group == "expert"]
    merges = [row for row in rows if row.group == "merge"]
    forgetting = max(experts, key=lambda row: base.accuracy[0] - row.accuracy[0])
    best_expert = max(experts, key=lambda row: row.mean)
    worst, *_, best = sorted(merges, key=lambda row: row.mean)
    balanced = max(merges, key=lambda row: min(row.accuracy))
    above = sum(row.mean > best_expert.mean for row in merges)
    return [
        f"Forgetting: {domains[0]} goes from {base.accuracy[0]:.1f} to {forgetting.accuracy[0]:.1f} in {forgetting.name}.",
        f"Mean over the domains: base {base.mean:.1f}, best single expert {best_expert.mean:.1f} ({best_expert.name}).",
        f"Of {len(merges)} merges {above} have a higher mean than the best expert; best {best.mean:.1f} ({best.name}), "
        f"worst {worst.mean:.1f} ({worst.name}).",
        f"Weakest domain: {min(balanced.accuracy):.1f} in the most balanced merge ({balanced.name}), "
        f"{max(min(row.accuracy) for row in experts):.1f} in the most balanced expert.",
    ]
