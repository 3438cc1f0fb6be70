"""Is a merge likely to work? The premises of averaging weights, checked on the models that a recipe names, in plain words."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.plan import Plan, make_plan
from .interference import CORRELATED, DOMINANT, InterferenceReport, interference_report
from .models import Model, stored_model
from .shared_base import Kinship, judge_pair, matmul_weights

__all__ = ["FINE", "Finding", "MergeDiagnosis", "diagnose_merge"]

FINE, DOUBTFUL, BAD = "fine", "doubtful", "bad"
LARGE_DRIFT = 0.3
"""||tuned - base|| / ||base|| from which a model counts as far from its base. A heuristic; most fine-tunes stay below 0.05."""
CONFLICT = 0.05
"""Sign conflicts above chance, as a share, from which they are said to interfere. A heuristic."""

EXIT = {FINE: 0, DOUBTFUL: 3, BAD: 4}


@dataclass(frozen=True)
class Finding:
    """One premise: its name, ``"fine"``, ``"doubtful"`` or ``"bad"``, and why."""

    premise: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class MergeDiagnosis:
    """What :func:`diagnose_merge` found.

    Attributes:
        findings: by premise.
        kinships: of the models with the base, or with each other.
        report: of interference; of the models' own weights where the recipe has no base.
        method: that the recipe merges by.
        has_base: whether the recipe has a base that models are compared with.
    """

    findings: tuple[Finding, ...]
    kinships: tuple[Kinship, ...]
    report: InterferenceReport
    method: str
    has_base: bool

    @property
    def outcome(self) -> str:
        """The worst of the findings."""
        found = {f.outcome for f in self.findings}
        return BAD if BAD in found else DOUBTFUL if DOUBTFUL in found else FINE

    @property
    def exit_code(self) -> int:
        """0 fine, 3 doubtful, 4 bad."""
        return EXIT[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        from .shared_base import SharedBase

        return {
            "outcome": self.outcome,
            "method": self.method,
            "findings": [vars(f) for f in self.findings],
            "kinships": SharedBase(self.kinships, {}, {}).to_dict()["pairs"],
            "interference": self.report.to_dict(),
        }

    def to_text(self) -> str:
        """In plain words."""
        summary = {
            FINE: "Nothing in the weights speaks against this merge.",
            DOUBTFUL: "This merge may disappoint, for the reasons below.",
            BAD: "This merge is not likely to work, for the reasons below.",
        }[self.outcome]
        lines = [f"{self.outcome}: {summary}", ""]
        lines += [f"[{f.outcome}] {f.premise}: {f.reason}" for f in self.findings]
        if self.has_base:
            lines += ["", self.report.to_text().rstrip()]
        lines += ["", "These are premises, not a forecast: how good the result is, only an evaluation shows."]
        return "\n".join(lines) + "\n"


def diagnose_merge(
    recipe: str | os.PathLike | Mapping | Plan,
    *,
    trim: float = 0.2,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> MergeDiagnosis:
    """Check the premises of a merge on the models that a recipe names, in one pass over their files. Writes nothing.

    Args:
        recipe: as :func:`pymerge.merge` takes it, or a plan.
        trim, threads, progress: as :func:`interference_report` has them.

    Raises:
        ValueError: no tensor is merged from two models or more.
        RecipeError: the recipe, or the headers of its models, do not allow the merge.
        CheckpointError, NonFiniteError: a model cannot be read.
    """
    if not isinstance(recipe, Plan):
        with make_plan(recipe) as plan:
            return diagnose_merge(plan, trim=trim, threads=threads, progress=progress)
    base, models, left_out = _models(recipe)
    report = interference_report(base, models, trim=trim, threads=threads, progress=progress)
    if left_out:
        report = replace(report, skipped=(*report.skipped, f"{left_out} tensors that come from other models than most do"))
    kinships = _kinships(report, base.label if base is not None else None)
    findings = [_shared_base(kinships), *(_task_vectors(report) if base is not None else ())]
    return MergeDiagnosis(tuple(findings), kinships, report, recipe.method.name, base is not None)


def _models(plan: Plan) -> tuple[Model | None, dict[str, Model], int]:
    """The base, if deltas are taken from it, the models by name, and how many tensors they do not have: a recipe with slices or modules may
    take tensors from different models, and the models that most elements come from are compared."""
    groups: dict[tuple, list] = {}
    for tensor in plan.tensors:
        if not tensor.copied and len(tensor.inputs) > 1:
            groups.setdefault((tensor.has_base, tuple(index for index, _ in tensor.inputs)), []).append(tensor)
    if not groups:
        raise ValueError("the recipe takes every tensor from one model; there is nothing to compare")
    (has_base, indices), tensors = max(groups.items(), key=lambda item: sum(t.inputs[0][1].numel for t in item[1]))
    found: dict[str, Model] = {}
    for position, index in enumerate(indices):
        name = plan.names[index] if plan.names[index] not in found else f"{plan.names[index]} (input {position})"
        found[name] = stored_model(plan.checkpoints[index], {t.output.name: t.inputs[position][1] for t in tensors}, name)
    base = found.pop(next(iter(found))) if has_base else None
    return base, found, sum(not t.copied for t in plan.tensors) - len(tensors)


def _kinships(report: InterferenceReport, base: str | None) -> tuple[Kinship, ...]:
    """From the same read: with a base, each model with it, else each two models."""
    found = report.statistics
    shapes = {name: report.shapes[name] for name in found}
    matrices = matmul_weights(shapes, found)
    every = range(len(report.models))
    if base is not None:
        return tuple(
            judge_pair(
                report.models[i],
                base,
                {n: found[n].weight_cosine(i) for n in matrices},
                [n for n in matrices if found[n].changed(i) == 0],
                report.skipped,
            )
            for i in every
        )
    pairs = [(i, j) for i in every for j in every if i < j]
    return tuple(
        judge_pair(report.models[i], report.models[j], {n: found[n].weight_cosine(i, j) for n in matrices}, [], report.skipped)
        for i, j in pairs
    )


def _shared_base(kinships: tuple[Kinship, ...]) -> Finding:
    worst = [k for k in kinships if k.verdict == "FAIL"] or [k for k in kinships if k.verdict == "WARN"]
    if not worst:
        low = min((k.median for k in kinships), default=1.0)
        return Finding("shared base", FINE, f"the models share one (lowest median cosine of matrices {low:.4f})")
    return Finding("shared base", BAD if worst[0].verdict == "FAIL" else DOUBTFUL, "; ".join(k.sentence() for k in worst))


def _task_vectors(report: InterferenceReport) -> list[Finding]:
    total, names = report.total, report.models
    far = [f"{n} by {r:.1%}" for n, r in zip(names, total.relative) if r > LARGE_DRIFT]
    same = [n for n, norm in zip(names, total.norms) if norm == 0]
    findings = []
    if same:
        findings.append(Finding("drift", DOUBTFUL, f"{', '.join(same)} equals the base and adds nothing"))
    elif far:
        findings.append(Finding("drift", DOUBTFUL, f"far from the base: {', '.join(far)} of its norm"))
    else:
        findings.append(Finding("drift", FINE, f"at most {max(total.relative):.2%} of the base's norm"))
    if len(names) < 2:
        return findings
    if total.imbalance > DOMINANT:
        longest = names[max(range(len(names)), key=lambda i: total.norms[i])]
        reason = (
            f"{longest} is {total.imbalance:.1f} times as far from the base as the nearest model, and will dominate; give it less weight"
        )
        findings.append(Finding("balance", DOUBTFUL, reason))
    else:
        findings.append(Finding("balance", FINE, f"the longest task vector is {total.imbalance:.2f} times the shortest"))
    conflict = f"signs differ at {total.sign_conflict:.1%} of the shared large changes, chance gives {total.expected_conflict:.1%}"
    outcome = DOUBTFUL if total.excess_conflict > CONFLICT else FINE
    findings.append(Finding("sign conflicts", outcome, conflict))
    if total.largest_cosine < -CORRELATED:
        reason = f"two models undo each other's changes (cosine {total.largest_cosine:.2f}); their sum cancels"
        findings.append(Finding("angles", DOUBTFUL, reason))
    elif total.largest_cosine > CORRELATED:
        reason = (
            f"cosine {total.largest_cosine:.2f}: the models changed alike, so sums of task vectors overshoot; average them or scale down"
        )
        findings.append(Finding("angles", DOUBTFUL, reason))
    else:
        findings.append(Finding("angles", FINE, f"task vectors are nearly orthogonal (largest cosine {total.largest_cosine:+.3f})"))
    outliers = report.outliers()
    if outliers:
        reason = ", ".join(f"{name} ({c:+.2f})" for name, c in outliers)
        findings.append(Finding("tensors that stand out", FINE, f"cosines far above the rest: {reason}"))
    return findings
