"""Do task vectors get in each other's way? Angles, signs, sizes and supports of tau_i = model_i - base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .drift import Drift, layer_group, plain
from .models import Model, common_tensors, named, open_model
from .scan import scan
from .spectral import Spectral, spectral_measures
from .statistics import Statistics, pool

__all__ = ["CORRELATED", "DOMINANT", "Interference", "InterferenceReport", "interference_report"]

CORRELATED = 0.2
"""Cosine from which two task vectors count as correlated: a heuristic. Unrelated tasks are nearly orthogonal (Ilharco et al. 2023)."""

DOMINANT = 3.0
"""Ratio of the longest to the shortest task vector from which one dominates. A heuristic."""


@dataclass(frozen=True)
class Interference:
    """Of one tensor, or of all as one vector. Matrices are by model, in the report's order; NaN where a task vector is zero.

    Attributes:
        norms: ||tau_i||.
        relative: ||tau_i|| / ||base||.
        cosines: of each two task vectors.
        sign_conflict: of the elements that two models or more keep after trimming, the share with different signs.
        expected_conflict: what fair coins would give on these elements; 1 - 2^(1-N) where all N models keep one.
        pair_conflict: per pair, the share of opposite signs where both keep; chance is 1/2.
        agreement_mass: sum |sum_i tau_i| / sum sum_i |tau_i|.
        jaccard: overlap of the kept elements; chance is t / (2 - t) for a kept share t.
        kept: share of the elements that was really kept, per model.
        sum_ratio: ||sum tau_i|| / sqrt(sum ||tau_i||^2); 1 for orthogonal ones, above for aligned ones.
        imbalance: the longest by the shortest task vector.
        spectral: matrices only, when asked for.
    """

    norms: tuple[float, ...]
    relative: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    sign_conflict: float
    expected_conflict: float
    pair_conflict: tuple[tuple[float, ...], ...]
    agreement_mass: float
    jaccard: tuple[tuple[float, ...], ...]
    kept: tuple[float, ...]
    sum_ratio: float
    imbalance: float
    spectral: Spectral | None = None

    @property
    def excess_conflict(self) -> float:
        """Sign conflicts above chance; below 0 the models agree more than chance."""
        return self.sign_conflict - self.expected_conflict

    @property
    def largest_cosine(self) -> float:
        """The cosine of two different models that is farthest from 0; NaN if there is none."""
        found = [c for i, row in enumerate(self.cosines) for j, c in enumerate(row) if i < j and not math.isnan(c)]
        return max(found, key=abs, default=math.nan)

    @classmethod
    def of(cls, s: Statistics, spectral: Spectral | None = None) -> Interference:
        """From statistics."""
        every = range(s.models)

        def matrix(f: Callable[[int, int], float], own: float) -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(own if i == j else f(i, j) for j in every) for i in every)

        norms = tuple(s.norm(i) for i in every)
        return cls(
            norms=norms,
            relative=tuple(s.relative(i) for i in every),
            cosines=matrix(s.cosine, 1.0),
            sign_conflict=s.sign_conflict,
            expected_conflict=s.expected_conflict,
            pair_conflict=matrix(s.pair_conflict, 0.0),
            agreement_mass=s.agreement_mass,
            jaccard=matrix(s.jaccard, 1.0),
            kept=tuple(s.kept(i) / max(s.numel, 1) for i in every),
            sum_ratio=s.sum_ratio,
            imbalance=max(norms) / min(norms) if min(norms) else math.inf if max(norms) else 1.0,
            spectral=spectral,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = plain({k: v for k, v in vars(self).items() if k != "spectral"})
        for key in ("cosines", "pair_conflict", "jaccard"):
            values[key] = [[x if math.isfinite(x) else None for x in row] for row in values[key]]
        for key in ("norms", "relative", "kept"):
            values[key] = [x if math.isfinite(x) else None for x in values[key]]
        values["excess_conflict"] = plain({"x": self.excess_conflict})["x"]
        return {**values, "spectral": self.spectral.to_dict() if self.spectral else None}


@dataclass(frozen=True)
class InterferenceReport:
    """What :func:`interference_report` found.

    Attributes:
        models: names, in the order of rows and columns.
        trim: the share of each tensor's deltas that was to be kept.
        estimated: whether thresholds came from a sample.
        total: all tensors as one vector.
        tensors: by name; empty with ``per_tensor=False``.
        statistics: the sums and counts by tensor.
        shapes: by tensor.
        skipped: tensors that could not be compared, and why.
    """

    models: tuple[str, ...]
    trim: float
    estimated: bool
    total: Interference
    tensors: Mapping[str, Interference]
    statistics: Mapping[str, Statistics]
    shapes: Mapping[str, tuple[int, ...]]
    skipped: tuple[str, ...] = ()

    def drift(self, i: int) -> Drift:
        """How far model i is from the base, over all tensors."""
        return Drift.of(pool(self.statistics.values(), len(self.models)), i)

    def groups(self) -> dict[str, Interference]:
        """By layer."""
        parts: dict[str, list[Statistics]] = {}
        for name, s in self.statistics.items():
            parts.setdefault(layer_group(name), []).append(s)
        return {name: Interference.of(pool(found, len(self.models))) for name, found in parts.items()}

    def outliers(self, k: int = 5) -> list[tuple[str, float]]:
        """The tensors with the largest cosines between two task vectors, of those whose cosines lie far above what the whole has."""
        limit = max(CORRELATED, 2 * abs(self.total.largest_cosine))
        found = [(name, t.largest_cosine) for name, t in self.tensors.items() if abs(t.largest_cosine) > limit]
        return sorted(found, key=lambda item: -abs(item[1]))[:k]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "models": list(self.models),
            "trim": self.trim,
            "estimated": self.estimated,
            "total": self.total.to_dict(),
            "tensors": {name: t.to_dict() for name, t in self.tensors.items()},
            "skipped": list(self.skipped),
        }

    def to_text(self) -> str:
        """Tables and sentences."""
        t, count = self.total, len(self.models)
        width = max(len(m) for m in self.models)
        lines = [f"{'':<{width}}   ||task vector||   of base     cosines"]
        for i, name in enumerate(self.models):
            row = " ".join(f"{c:+.3f}" for c in t.cosines[i])
            lines.append(f"{name:<{width}}   {t.norms[i]:15.4g}  {t.relative[i]:8.3%}     {row}")
        if count > 1:
            lines += [
                f"signs differ at {t.sign_conflict:.1%} of the elements that two or more keep; chance gives {t.expected_conflict:.1%}",
                f"agreement mass {t.agreement_mass:.3f}; chance gives {1 / math.sqrt(count):.3f}, 1 is no cancellation",
                f"||sum|| / sqrt(sum of squares) {t.sum_ratio:.3f}; 1 is orthogonal, {math.sqrt(count):.3f} all the same",
                f"longest by shortest task vector {t.imbalance:.2f}",
            ]
        lines += [f"  {name}: cosine {c:+.2f}" for name, c in self.outliers()]
        kept = ", ".join(f"{k:.1%}" for k in t.kept)
        lines.append(f"of each tensor the largest {self.trim:.0%} were to be kept; kept: {kept}")
        lines += [f"not compared: {reason}" for reason in self.skipped]
        return "\n".join(lines) + "\n"

    def plot(self) -> Any:
        """A matplotlib figure: cosines, and conflict and size by layer."""
        from .plots import interference

        return interference(self)


def interference_report(
    base: Any,
    tuned: Any,
    *,
    trim: float = 0.2,
    per_tensor: bool = True,
    spectral: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> InterferenceReport:
    """Angles, sign conflicts, sizes and overlap of task vectors, in one streaming pass over models in memory or on disk.

    docs/diagnostics.md has formulas, sources and chance levels. No single number predicts how every merge method will do
    (arXiv:2601.22285).

    Args:
        base: what the models were tuned from, as :func:`weight_drift` takes it; None when `tuned` are task vectors themselves.
        tuned: a mapping name -> model, or a list; 1 to 64.
        trim: share of each tensor's largest deltas that signs and supports are compared on (0.2 as TIES; 1: all that are not 0). For files
            the threshold is estimated from a sample of 32,768 elements a tensor; ``kept`` is exact and shows how well.
        per_tensor: keep the measures of every tensor.
        spectral: measures from the singular values of every matrix too: minutes for large models, and whole tensors in memory.
        threads, progress: see :func:`pymerge.diagnostics.scan.scan`.

    Raises:
        ValueError: trim is not in (0, 1], or nothing can be compared. CheckpointError, NonFiniteError, TypeError: a model cannot be read.
    """
    if not 0 < trim <= 1:
        raise ValueError(f"trim is {trim}; it is the share that is kept, above 0 and at most 1")
    models = [open_model(m, name) for name, m in named(tuned).items()]
    first = None if base is None else open_model(base, "base")
    given = models if first is None else [first, *models]
    common = common_tensors(given)
    if not common.names:
        raise ValueError("the models have no tensor in common" + (f": {common.problems[0]}" if common.problems else ""))
    found = scan(first, models, common.names, trim=None if trim == 1 else trim, threads=threads, progress=progress)
    measures = {name: _spectral(first, models, name) for name in common.names} if spectral else {}
    tensors = {name: Interference.of(s, measures.get(name)) for name, s in found.items()} if per_tensor or spectral else {}
    return InterferenceReport(
        models=tuple(m.label for m in models),
        trim=trim,
        estimated=trim < 1 and not all(m.in_memory for m in given),
        total=Interference.of(pool(found.values(), len(models))),
        tensors=tensors,
        statistics=found,
        shapes={name: models[0].shapes[name] for name in found},
        skipped=common.problems,
    )


def _spectral(base: Model | None, models: list[Model], name: str) -> Spectral | None:
    if len(models[0].shapes[name]) != 2 or min(models[0].shapes[name]) < 2:
        return None
    b = None if base is None else base.tensor(name).float()
    return spectral_measures([m.tensor(name).float() if b is None else m.tensor(name).float() - b for m in models])
