"""Pictures of a result file: python -m benchmarks.suite.plots [FILE] [--out docs/benchmarks]

roofline.svg   how near each method comes to the machine's memory
speedup.svg    how many times faster than others
scaling.svg    with size, number of models, density and threads
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from .pages import newest_result

__all__ = ["draw"]

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("linear", "task_arithmetic", "wise_ft", "ema", "slerp", "dare_linear", "dare_ties", "ties")
RIVALS = {"naive": "naive torch", "torch": "best of torch", "averaged": "torch's averages", "mergekit": "mergekit", "peft": "PEFT"}
COLOURS = {
    "linear": "tab:blue", "task_arithmetic": "tab:cyan", "ties": "tab:red", "dare_ties": "tab:orange", "dare_linear": "tab:olive",
    "slerp": "tab:purple", "kl forward": "tab:green",
}  # fmt: skip


def draw(result: dict, folder: Path) -> list[Path]:
    """Draw what the rows allow, as SVG; the same result gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text as text is a tenth of the size, and a fixed salt and no date make the file depend on the result alone.
    style = {"svg.fonttype": "none", "svg.hashsalt": "pymerge", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context(style):
        for name, picture in (("roofline", _roofline), ("speedup", _speedup), ("scaling", _scaling)):
            figure = picture(plt, result)
            if figure is not None:
                drawn.append(folder / f"{name}.svg")
                figure.savefig(drawn[-1], metadata={"Date": None})
                plt.close(figure)
    return drawn


def _title(result: dict) -> str:
    machine = result["machine"]
    return f"{machine['cores']} cores of {machine['cpu']} ({machine['isa']}), {result['date']}"


def _main(result: dict) -> list[dict]:
    return [row for row in result["rows"] if row["group"] == "main" and row["method"] in METHODS]


def _roofline(plt, result: dict):
    """Bytes that have to move over the time, against the fastest way to move them in the same run."""
    rows = _main(result)
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 0.36 * len(rows) + 1.4), layout="constrained")
    labels = [row["method"] for row in rows]
    axes.barh(labels, [row["gb_per_s"] for row in rows], color="tab:blue", label="pymerge")
    copies = [row["copy_gb_per_s"] for row in rows]
    axes.plot(copies, labels, "k|", markersize=15, markeredgewidth=2, label="the memory: fastest copy of these bytes")
    for row in rows:
        axes.text(row["gb_per_s"], row["method"], f" {row['to_copy'][0]:.2f} x copy", va="center", fontsize=8)
    axes.set_xlabel("GB/s, inputs read once and output written once")
    axes.set_title(f"{rows[0]['elements'] / 2**20:.0f}M elements, {rows[0]['dtype']}; {_title(result)}", fontsize=9, loc="left")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    return figure


def _speedup(plt, result: dict):
    rows = [row for row in _main(result) if any("speedup" in r for r in row["rivals"])]
    if not rows:
        return None
    kinds = [kind for kind in RIVALS if any(r["kind"] == kind and "speedup" in r for row in rows for r in row["rivals"])]
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        bars = [(j, r["speedup"]) for j, row in enumerate(rows) for r in row["rivals"] if r["kind"] == kind and "speedup" in r]
        x, height = [j + (i - (len(kinds) - 1) / 2) * width for j, _ in bars], [s[0] for _, s in bars]
        axes.bar(x, height, width, label=RIVALS[kind])
        spread = [[max(0, s[0] - s[1]) for _, s in bars], [max(0, s[2] - s[0]) for _, s in bars]]
        axes.errorbar(x, height, spread, fmt="none", ecolor="k", elinewidth=0.7)
    axes.axhline(1, color="k", linewidth=0.7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [row["method"] for row in rows], rotation=20, ha="right")
    axes.set_ylabel("times faster (quartiles)")
    axes.set_title(_title(result), fontsize=9, loc="left")
    axes.legend(ncols=len(kinds), frameon=False, fontsize=8)
    return figure


def _scaling(plt, result: dict):
    """Four panels; each with time over the copy, but for threads, where it is the speed over that of one."""
    rows = [row for row in result["rows"] if row["layout"] == "one"]
    size = [row for row in rows if row["group"].startswith("size") or row["group"] == "main"]
    panels: list[tuple[str, list[dict], Callable[[dict], float]]] = [
        ("elements", size, lambda r: r["elements"]),
        ("models", [row for row in rows if row["group"] == "models"], lambda r: r["models"]),
        ("density", [row for row in rows if row["group"] == "density"], lambda r: r["density"]),
    ]
    figure, grid = plt.subplots(2, 2, figsize=(7.5, 5.2), layout="constrained")
    axes = grid.flatten()
    for ax, (label, some, key) in zip(axes, panels):
        for method in COLOURS:
            points = sorted((key(row), row["to_copy"][0]) for row in some if row["method"] == method)
            if len(points) > 1:
                ax.plot(*zip(*points), "o-", color=COLOURS[method], markersize=4, label=method)
        ax.axhline(1, color="k", linewidth=0.7)
        ax.set_ylim(bottom=0)
        ax.set_xlabel(label)
        ax.set_ylabel("time over the copy's")
    axes[0].set_xscale("log", base=2)
    _threads(axes[3], result["rows"])
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=7)
    figure.suptitle(_title(result), fontsize=9, x=0.01, ha="left")
    return figure


def _threads(ax, rows: list[dict]) -> None:
    most = 1
    for method in COLOURS:
        some = [row for row in rows if row["method"] == method and row["group"] in ("threads", "kl 32k")]
        one = next((row["ms"] for row in some if row["threads"] == 1), None)
        if one is not None:
            points = sorted((row["threads"], one / row["ms"]) for row in some)
            most = max(most, points[-1][0])
            ax.plot(*zip(*points), "o-", color=COLOURS[method], markersize=4, label=method)
    ax.plot([1, most], [1, most], "k--", linewidth=0.7)
    ax.set_xlabel("threads")
    ax.set_ylabel("speed over that of one thread")
    ax.set_xticks(range(1, most + 1) if most < 9 else [1, most])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a result of `make bench`; the newest by default")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder for the pictures")
    args = parser.parse_args(arguments)
    for path in draw(json.loads((args.file or newest_result()).read_text()), args.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
