"""Pictures of diagnostics. Need matplotlib (``pip install "pymerge-kernels[report]"``)."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["interference", "interpolation"]


def interference(report: Any) -> Any:
    """Cosines between task vectors; relative size and sign conflicts above chance by layer."""
    from matplotlib.figure import Figure

    groups = report.groups()
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    image = left.imshow(report.total.cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, row in enumerate(report.total.cosines):
        for j, value in enumerate(row):
            if not math.isnan(value):
                left.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if abs(value) > 0.6 else "black")
    left.set_xticks(range(len(report.models)), report.models, rotation=30, ha="right")
    left.set_yticks(range(len(report.models)), report.models)
    left.set_title("cosines of task vectors", fontsize=10)
    figure.colorbar(image, ax=left, shrink=0.7)
    x = range(len(groups))
    for i, name in enumerate(report.models):
        middle.plot(x, [g.relative[i] for g in groups.values()], ".-", label=name)
    middle.set_title("||task vector|| / ||base|| by layer", fontsize=10)
    middle.legend(fontsize=8)
    right.plot(x, [g.excess_conflict for g in groups.values()], ".-", color="C3")
    right.axhline(0, color="0.7", linestyle="--")
    right.set_title("sign conflicts above chance by layer", fontsize=10)
    step = max(1, len(groups) // 12)
    for axes in (middle, right):
        axes.set_xticks(list(x)[::step], list(groups)[::step], rotation=45, ha="right", fontsize=7)
    return figure


def interpolation(curve: Any) -> Any:
    """Losses along the line, and the straight line between the ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve.alphas, curve.losses, "o-", label="interpolated")
    axes.plot([0, 1], [curve.losses[0], curve.losses[-1]], "--", color="0.6", label="line between the ends")
    axes.set_xlabel("alpha")
    axes.set_ylabel("loss")
    axes.set_title(f"barrier {curve.barrier():.4g}", fontsize=10)
    axes.legend(fontsize=8)
    return figure
