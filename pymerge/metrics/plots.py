"""Pictures of what was learnt and forgotten. Need matplotlib (``pip install "pymerge-kernels[report]"``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .matrix import ResultMatrix

__all__ = ["heatmap", "pareto", "pareto_front"]


def heatmap(matrix: ResultMatrix, *, reference: str | int = 0, title: str = "") -> Any:
    """A matplotlib figure of stages by tasks: scores as numbers, the change against a stage as colour, missing cells hatched.

    The stage that introduces a task is framed.
    """
    from matplotlib.figure import Figure

    rows, columns = len(matrix.stages), len(matrix.tasks)
    change = [[matrix.gain(s, t) - matrix.gain(reference, t) for t in matrix.tasks] for s in matrix.stages]
    known = [abs(x) for row in change for x in row if not math.isnan(x)]
    limit = max(known, default=1.0) or 1.0
    figure = Figure(figsize=(1.6 + 1.1 * columns, 1.2 + 0.5 * rows), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(change, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for i, stage in enumerate(matrix.stages):
        for j, task in enumerate(matrix.tasks):
            score = matrix.score(stage, task)
            if math.isnan(score):
                axes.add_patch(_box(j, i, hatch="///", edgecolor="0.6"))
            else:
                strong = abs(change[i][j]) > 0.6 * limit
                axes.text(j, i, f"{score:.3g}", ha="center", va="center", fontsize=9, color="white" if strong else "black")
            if matrix.introduced[task] == i:
                axes.add_patch(_box(j, i, edgecolor="black", linewidth=1.5))
    axes.set_xticks(range(columns), matrix.tasks, rotation=30, ha="right")
    axes.set_yticks(range(rows), matrix.stages)
    name = matrix.stages[reference] if isinstance(reference, int) else reference
    figure.colorbar(image, ax=axes, label=f"change against {name!r} (blue: better)")
    axes.set_title(title or "frame: the stage that trains the task", fontsize=9)
    return figure


def _box(column: int, row: int, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, **style)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other is better than in one number and at least as good as in the other; by ascending first number."""
    front = [name for name, (x, y) in points.items() if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())]
    return sorted(front, key=lambda name: points[name])


def pareto(
    points: Mapping[str, tuple[float, float]],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    labels: tuple[str, str] = ("old tasks", "new task"),
    title: str = "",
) -> Any:
    """A matplotlib figure of (score on old tasks, score on the new one) by name, more being better, with the best trade-offs joined.

    `groups` joins points that belong together, a method at several settings, and colours them alike.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    grouped = dict(groups or {})
    left = [name for name in points if not any(name in members for members in grouped.values())]
    for number, (label, members) in enumerate(grouped.items()):
        axes.plot(*zip(*(points[m] for m in members)), "o-", color=f"C{number}", label=label, markersize=5)
    for name in left:
        axes.plot(*points[name], "k*", markersize=9)
    for name in left if grouped else points:
        axes.annotate(name, points[name], xytext=(5, 4), textcoords="offset points", fontsize=8)
    front = [points[name] for name in pareto_front(points)]
    axes.step(*zip(*front), where="pre", color="0.7", linestyle="--", zorder=0, label="best trade-offs")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    return figure
