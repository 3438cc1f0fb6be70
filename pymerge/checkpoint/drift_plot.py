"""A picture of :func:`pymerge.checkpoint.drift.diff`: relative drift over the layers. Needs matplotlib."""

from __future__ import annotations

import math
import os

from .drift import CheckpointDrift
from .groups import kind_of, stack_of

__all__ = ["plot_drift"]

LINES = 10
"""Kinds of tensors drawn, those that drift most: more lines than colours cannot be told apart."""


def plot_drift(result: CheckpointDrift, file: str | os.PathLike, title: str = "") -> None:
    """Draw the relative drift ||a - b|| / ||b|| of every layer, and of the kinds of tensors in it; bars where there are no layers.

    Args:
        result: of :func:`pymerge.checkpoint.drift.diff`.
        file: to write; its suffix chooses the format (.png, .svg, .pdf).
        title: of the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the format is not known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    stacks = [stack_of(layer.name) for layer in result.by_layer()]
    longest = max((index for _, index in filter(None, stacks)), default=0)
    if longest > 0:
        _lines(axes, result)
    else:
        drifts = [(d.name, d.relative) for d in reversed(result.by_layer()) if math.isfinite(d.relative)]
        axes.barh([name for name, _ in drifts], [value for _, value in drifts])
        axes.set_xlabel("relative drift ||a - b|| / ||b||")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150, metadata={"Software": None} if str(file).endswith(".png") else None)


def _lines(axes, result: CheckpointDrift) -> None:
    stacks: dict[str, list[tuple[int, float]]] = {}
    for layer in result.by_layer():
        stack = stack_of(layer.name)
        if stack and math.isfinite(layer.relative):
            stacks.setdefault(stack[0], []).append((stack[1], layer.relative))
    for name, points in stacks.items():
        axes.plot(*zip(*points, strict=True), color="black", linewidth=2, marker="o", markersize=4, label=f"{name}, whole layers")
    kinds: dict[str, list[tuple[int, float]]] = {}
    for tensor in result.tensors:
        stack = stack_of(tensor.name)
        if stack and tensor.changed and math.isfinite(tensor.relative):
            kinds.setdefault(kind_of(tensor.name), []).append((stack[1], tensor.relative))
    strongest = sorted(kinds, key=lambda kind: -max(value for _, value in kinds[kind]))[:LINES]
    for kind in strongest:
        axes.plot(*zip(*kinds[kind], strict=True), linewidth=1, alpha=0.8, label=kind.partition("*.")[2] or kind)
    positive = [value for points in [*stacks.values(), *kinds.values()] for _, value in points if value > 0]
    if positive and max(positive) > 100 * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative drift ||a - b|| / ||b||")
    axes.legend(fontsize="x-small", ncols=2)
