"""Everything that can be said of a result matrix, as text or plain values."""

from __future__ import annotations

import math
from typing import Any

from . import transfer as metrics
from .gate import GateReport
from .matrix import ResultMatrix

__all__ = ["as_dict", "as_text"]


def _all(matrix: ResultMatrix) -> dict[str, metrics.Metric]:
    """The metrics that this matrix allows; what it lacks is left out and listed as skipped."""
    found = {}
    for metric in (
        metrics.average_accuracy, metrics.learning_accuracy, metrics.backward_transfer, metrics.forgetting, metrics.forward_transfer,
        metrics.retention, metrics.worst_case_accuracy,
    ):  # fmt: skip
        try:
            result = metric(matrix, missing="skip")
        except ValueError:  # units that do not mix, no baseline, a reference at the chance level
            continue
        if result.parts:
            found[result.name] = result
    return found


def as_dict(matrix: ResultMatrix, gate: GateReport | None = None) -> dict[str, Any]:
    """For JSON: ``matrix``, ``metrics`` by name with value, parts and what was skipped, and ``gate``."""
    return {
        "matrix": matrix.to_dict(),
        "metrics": {
            name: {"value": m.value, "parts": {str(k): v for k, v in m.parts.items()}, "skipped": list(map(str, m.skipped))}
            for name, m in _all(matrix).items()
        },
        "gate": gate.to_dict() if gate else None,
    }


def as_text(matrix: ResultMatrix, gate: GateReport | None = None) -> str:
    """Markdown: the scores, the metrics, the gate."""

    def cell(stage: str, task: str) -> str:
        score = matrix.score(stage, task)
        if math.isnan(score):
            return "-"
        first = stage == matrix.stages[0] or math.isnan(matrix.score(0, task))
        return f"{score:.4g}" if first else f"{score:.4g} ({score - matrix.score(0, task):+.3g})"

    lines = ["| stage | " + " | ".join(matrix.tasks) + " |", "|---|" + "--:|" * len(matrix.tasks)]
    lines += [f"| {s} | " + " | ".join(cell(s, t) for t in matrix.tasks) + " |" for s in matrix.stages]
    lower = [t for t in matrix.tasks if not matrix.higher_is_better[t]]
    notes = [f"In parentheses: change against {matrix.stages[0]!r}." if len(matrix.stages) > 1 else ""]
    notes += [f"Lower is better: {', '.join(lower)}."] if lower else []
    lines += ["", " ".join(n for n in notes if n), ""]
    for name, metric in _all(matrix).items():
        skipped = f", without {', '.join(map(str, metric.skipped))} (not measured)" if metric.skipped else ""
        lines.append(f"* {name}: {metric.value:+.4g}" if metric.value < 0 else f"* {name}: {metric.value:.4g}")
        lines[-1] += f" over {len(metric.parts)}{skipped}"
    if gate is not None:
        lines += ["", f"Gate, {matrix.stages[-1]!r} against {matrix.stages[0]!r}:", "", gate.to_markdown()]
    return "\n".join(lines).rstrip() + "\n"
