"""Do these models come from one initialisation? Averaging weights means something only if they do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .models import Model, common_tensors, named, open_model
from .scan import scan
from .statistics import Statistics

__all__ = ["COSINE_FAIL", "COSINE_PASS", "Kinship", "SharedBase", "check_shared_base", "judge_pair", "matmul_weights"]

COSINE_PASS, COSINE_FAIL = 0.9, 0.3
"""Median cosines from which models count as of one base, and below which they do not. Heuristics: independent initialisations give
0 +- 1/sqrt(elements), fine-tunes of one base stay near 1 (HuRef reports 0.97 and more for descendants of Llama); between lie heavy
continued pre-training and up-cycling."""

OUTLIER = 0.3
"""A tensor stands out when its cosine is this far below the median."""

AT_ONCE = 64
"""Models that are compared with another one in a pass."""


@dataclass(frozen=True)
class Kinship:
    """How two models, or a model and a base, belong together.

    Attributes:
        a, b: their names.
        verdict: ``"PASS"``, ``"WARN"`` or ``"FAIL"``.
        median: of the cosines of the weights that are matrices, NaN if there are none that both have.
        cosines: by tensor, only matrices (norms and biases are much alike in unrelated models).
        outliers: tensors whose cosine lies far below the median: swapped, resized, replaced or quantised anew.
        identical: matrices that are equal, bit for bit but for the sign of zeros.
        problems: tensors that only one of them has, or with other shapes.
    """

    a: str
    b: str
    verdict: str
    median: float
    cosines: Mapping[str, float]
    outliers: tuple[str, ...]
    identical: tuple[str, ...]
    problems: tuple[str, ...]

    def sentence(self) -> str:
        """The verdict in words."""
        words = {"PASS": "share a base", "WARN": "may share a base, but have moved far apart", "FAIL": "do not share a base"}
        text = f"{self.verdict}: {self.a} and {self.b} {words[self.verdict]}"
        if math.isnan(self.median):
            return f"{text}: there is no matrix that both have with one shape"
        text += f" (median cosine {self.median:.4f} over {len(self.cosines)} matrices)"
        if self.outliers:
            text += "; far from the rest: " + ", ".join(f"{n} ({self.cosines[n]:.2f})" for n in self.outliers[:5])
            text += f" and {len(self.outliers) - 5} more" if len(self.outliers) > 5 else ""
        if self.cosines and len(self.identical) == len(self.cosines):
            text += "; all matrices are identical"
        return text + (f"; {len(self.problems)} tensors do not match, the first: {self.problems[0]}" if self.problems else "")


@dataclass(frozen=True)
class SharedBase:
    """What :func:`check_shared_base` found.

    Attributes:
        pairs: each model with each other or, with bases, with each base.
        nearest: with bases: per model, the base with the smallest relative distance.
        distances: with bases: per model, per base, ||model - base|| / ||base|| over all matrices that both have.
    """

    pairs: tuple[Kinship, ...]
    nearest: Mapping[str, str]
    distances: Mapping[str, Mapping[str, float]]

    @property
    def verdict(self) -> str:
        """The worst of the pairs; with bases, of each model and its nearest one."""
        counted = [p for p in self.pairs if not self.nearest or self.nearest[p.a] == p.b]
        verdicts = {p.verdict for p in counted}
        return "FAIL" if "FAIL" in verdicts else "WARN" if "WARN" in verdicts else "PASS"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

        def number(x: float) -> float | None:
            return x if math.isfinite(x) else None

        pairs = [
            {**vars(p), "median": number(p.median), "cosines": {k: number(v) for k, v in p.cosines.items()}, "outliers": list(p.outliers)}
            for p in self.pairs
        ]
        distances = {m: {b: number(x) for b, x in row.items()} for m, row in self.distances.items()}
        return {"verdict": self.verdict, "pairs": pairs, "nearest": dict(self.nearest), "distances": distances}

    def to_text(self) -> str:
        """In words."""
        lines = [p.sentence() for p in self.pairs]
        lines += [f"{model} is nearest to {base}" for model, base in self.nearest.items() if len(self.distances[model]) > 1]
        return "\n".join(lines) + "\n"


def matmul_weights(shapes: Mapping[str, tuple[int, ...]], names) -> list[str]:
    """The names whose tensors have two dimensions or more and are no single row or column."""
    return [n for n in names if len(shapes[n]) >= 2 and sum(size > 1 for size in shapes[n]) >= 2]


def judge_pair(a: str, b: str, cosines: Mapping[str, float], identical, problems) -> Kinship:
    """The verdict from the cosines of the matrices; a tensor of zeros has none and does not count."""
    known = {name: c for name, c in cosines.items() if not math.isnan(c)}
    median = statistics.median(known.values()) if known else math.nan
    verdict = "PASS" if median >= COSINE_PASS else "WARN" if median >= COSINE_FAIL else "FAIL"
    outliers = sorted((n for n, c in known.items() if c < median - OUTLIER), key=lambda n: known[n])
    if verdict == "PASS" and outliers:
        verdict = "WARN"
    return Kinship(a, b, verdict, median, dict(cosines), tuple(outliers), tuple(identical), tuple(problems))


def check_shared_base(models: Any, bases: Any = None, *, threads: int | None = None) -> SharedBase:
    """Whether models share an initialisation, from the weights alone; with `bases`, which of them each model was tuned from.

    The median cosine of matching matrices decides; documented heuristics, not a test: stronger ones with p-values are published
    (Zhu et al. 2025, arXiv:2502.12292). Models whose neurons were permuted are found unrelated, and cannot be averaged either.

    Args:
        models: a list, or a mapping name -> model; models as :func:`weight_drift` takes them. At least two, or one with `bases`.
        bases: candidates, likewise.
        threads: see :func:`pymerge.diagnostics.scan.scan`.

    Raises:
        ValueError: fewer models. CheckpointError, NonFiniteError, TypeError: a model cannot be read.
    """
    opened = [open_model(m, name) for name, m in named(models).items()]
    candidates = [open_model(m, name) for name, m in named(bases).items()] if bases is not None else []
    if len(opened) < 2 and not candidates:
        raise ValueError("one model and no base: there is nothing to compare it with")
    found: dict[tuple[str, str], tuple[Kinship, float]] = {}
    for b, others in [(b, opened) for b in candidates] or [(b, opened[:i]) for i, b in enumerate(opened) if i]:
        for start in range(0, len(others), AT_ONCE):
            found |= _compare(others[start : start + AT_ONCE], b, threads)
    pairs = [(m, b) for m in opened for b in candidates] or [(a, b) for i, a in enumerate(opened) for b in opened[i + 1 :]]
    judged = tuple(found[a.label, b.label][0] for a, b in pairs)
    distances = {m.label: {b.label: found[m.label, b.label][1] for b in candidates} for m in opened if candidates}
    nearest = {m: min(row, key=lambda b: (math.isnan(row[b]), row[b])) for m, row in distances.items()}
    return SharedBase(judged, nearest, distances)


def _compare(models: Sequence[Model], b: Model, threads: int | None) -> dict[tuple[str, str], tuple[Kinship, float]]:
    """Each model with `b`, in one pass over them: how they belong together, and ||model - b|| / ||b||. By the two labels."""
    commons = [common_tensors([b, m]) for m in models]
    matrices = [matmul_weights(b.shapes, common.names) for common in commons]
    holders: dict[str, list[int]] = {}
    for i, names in enumerate(matrices):
        for name in names:
            holders.setdefault(name, []).append(i)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, held in holders.items():
        groups.setdefault(tuple(held), []).append(name)
    found: list[dict[str, tuple[Statistics, int]]] = [{} for _ in models]  # statistics that have the model, and its place in them
    for held, names in groups.items():
        for name, s in scan(b, [models[i] for i in held], names, threads=threads).items():
            for place, i in enumerate(held):
                found[i][name] = (s, place)
    return {
        (m.label, b.label): _judge(m.label, b.label, {name: own[name] for name in names}, common.problems)
        for m, own, names, common in zip(models, found, matrices, commons)
    }


def _judge(a: str, b: str, found: Mapping[str, tuple[Statistics, int]], problems: Sequence[str]) -> tuple[Kinship, float]:
    cosines = {name: s.weight_cosine(i) for name, (s, i) in found.items()}
    identical = [name for name, (s, i) in found.items() if s.changed(i) == 0]
    moved = math.sqrt(sum(s.product(i + 1, i + 1) for s, i in found.values()))
    size = math.sqrt(sum(s.product(0, 0) for s, _ in found.values()))
    distance = moved / size if size else math.nan if not found else math.inf if moved else 0.0
    return judge_pair(a, b, cosines, identical, problems), distance
