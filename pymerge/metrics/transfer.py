"""The field's numbers for what was learnt and forgotten. Each says its formula and source; variants have names, as the literature does not
agree and published programs differ from the papers they cite.

R[i, j] is the score on task j after stage i, s(j) the stage that introduces j, T the last stage. Positive is better everywhere: where lower
scores are better (loss, perplexity) they are negated first. All functions take a :class:`ResultMatrix` or rows of numbers, and give
the mean over tasks with its parts. `missing="raise"` refuses missing scores, ``"skip"`` leaves their tasks out and says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .matrix import MissingScoreError, ResultMatrix, as_matrix

__all__ = [
    "Metric",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "intransigence",
    "learning_accuracy",
    "normalized_improvement",
    "retention",
    "worst_case_accuracy",
]


@dataclass(frozen=True)
class Metric:
    """A metric and what it is the mean of. ``float(metric)`` is the value.

    Attributes:
        name: of the metric.
        value: the mean of `parts`; NaN when there are none.
        parts: by task (average incremental accuracy and the "diaz" variants: by stage and task).
        skipped: what was left out because a score is missing.
    """

    name: str
    value: float
    parts: Mapping[Any, float]
    skipped: tuple[Any, ...] = ()

    def __float__(self) -> float:
        return self.value


def _mean(
    name: str, matrix: ResultMatrix, terms: Iterable[tuple[Any, str]], value: Callable[[Any], float], missing: str, unit: bool
) -> Metric:
    """The mean of value(key) over (key, task) pairs."""
    if missing not in ("raise", "skip"):
        raise ValueError(f"missing is {missing!r}; choose 'raise' or 'skip'")
    terms = list(terms)
    if unit:
        matrix.common_unit(dict.fromkeys(task for _, task in terms))
    parts = {key: value(key) for key, _ in terms}
    gaps = tuple(key for key, part in parts.items() if math.isnan(part))
    if gaps and missing == "raise":
        raise MissingScoreError(
            f"{name} needs scores that are missing, for {', '.join(map(str, gaps))}; measure them, or pass missing='skip'"
        )
    parts = {key: part for key, part in parts.items() if key not in gaps}
    return Metric(name, math.fsum(parts.values()) / len(parts) if parts else math.nan, parts, gaps)


def _sign(matrix: ResultMatrix, task: str) -> float:
    return 1.0 if matrix.higher_is_better[task] else -1.0


def average_accuracy(results: Any, *, missing: str = "raise") -> Metric:
    """Mean of R[T, j] over all tasks (Lopez-Paz and Ranzato 2017, ACC), as measured: lower stays lower."""
    m = as_matrix(results)
    return _mean("average accuracy", m, ((t, t) for t in m.tasks), lambda t: m.score(-1, t), missing, True)


def average_incremental_accuracy(results: Any, *, missing: str = "raise") -> Metric:
    """Mean over stages k of the mean of R[k, j] over the tasks introduced up to k (Rebuffi et al. 2017), as measured."""
    m = as_matrix(results)
    stages = [k for k in range(len(m.stages)) if any(s <= k for s in m.introduced.values())]
    m.common_unit(m.tasks)

    def at(k: int) -> float:
        known = [m.score(k, t) for t in m.tasks if m.introduced[t] <= k]
        return math.fsum(known) / len(known)

    named = {m.stages[k]: k for k in stages}
    return _mean("average incremental accuracy", m, ((s, m.tasks[0]) for s in named), lambda s: at(named[s]), missing, False)


def learning_accuracy(results: Any, *, missing: str = "raise") -> Metric:
    """Mean of R[s(j), j]: how well each task was learnt when its turn came (Riemer et al. 2019, LA), as measured."""
    m = as_matrix(results)
    return _mean("learning accuracy", m, ((t, t) for t in m.tasks), lambda t: m.score(m.introduced[t], t), missing, True)


def backward_transfer(results: Any, *, variant: str = "gem", missing: str = "raise") -> Metric:
    """What later stages did to earlier tasks; negative is forgetting.

    * ``"gem"``: mean of R[T, j] - R[s(j), j] over the tasks introduced before the last stage (Lopez-Paz and Ranzato 2017, eq. 3: divided by
      T - 1. Their published program divides by T.)
    * ``"diaz"``: mean of R[i, j] - R[s(j), j] over all i > s(j) (Diaz-Rodriguez et al. 2018, BWT).
    """
    m = as_matrix(results)
    last = len(m.stages) - 1
    earlier = [t for t in m.tasks if m.introduced[t] < last]
    if variant == "gem":
        return _mean("BWT", m, ((t, t) for t in earlier), lambda t: m.gain(last, t) - m.gain(m.introduced[t], t), missing, True)
    if variant == "diaz":
        terms = [((m.stages[i], t), t) for t in earlier for i in range(m.introduced[t] + 1, last + 1)]
        return _mean("BWT (diaz)", m, terms, lambda key: m.gain(key[0], key[1]) - m.gain(m.introduced[key[1]], key[1]), missing, True)
    raise ValueError(f"variant is {variant!r}; choose 'gem' or 'diaz'")


def forward_transfer(
    results: Any, baseline: Mapping[str, float] | Sequence[float] | None = None, *, variant: str = "gem", missing: str = "raise"
) -> Metric:
    """What earlier stages did for tasks that had not come yet.

    * ``"gem"``: mean of R[s(j) - 1, j] - b_j over the tasks that at least one training stage precedes (Lopez-Paz and Ranzato 2017, eq. 4).
    * ``"diaz"``: mean of R[i, j] over all i < s(j) from the first training stage on (Diaz-Rodriguez et al. 2018, FWT); no baseline.

    Args:
        results: as for all metrics.
        baseline: b_j by task or in their order: scores of the untrained or base model. By default the first row, if no task is introduced
            in it; else it has to be given.
        variant, missing: as above.
    """
    m = as_matrix(results)
    first = min(m.introduced.values())
    later = [t for t in m.tasks if m.introduced[t] > first]
    if variant == "diaz":
        terms = [((m.stages[i], t), t) for t in later for i in range(first, m.introduced[t])]
        return _mean("FWT (diaz)", m, terms, lambda key: m.gain(*key), missing, True)
    if variant != "gem":
        raise ValueError(f"variant is {variant!r}; choose 'gem' or 'diaz'")
    if baseline is None:
        if first == 0:
            raise MissingScoreError("FWT compares with an untrained model: add a row before the first stage, or pass baseline=")
        baseline = {t: m.score(0, t) for t in m.tasks}
    elif not isinstance(baseline, Mapping):
        values = [float(x) for x in baseline]
        if len(values) != len(m.tasks):
            raise ValueError(f"baseline has {len(values)} numbers for {len(m.tasks)} tasks")
        baseline = dict(zip(m.tasks, values))
    absent = [t for t in later if t not in baseline]
    if absent:
        raise MissingScoreError(f"baseline lacks {', '.join(map(repr, absent))}")
    known = baseline
    return _mean("FWT", m, ((t, t) for t in later), lambda t: m.gain(m.introduced[t] - 1, t) - _sign(m, t) * known[t], missing, True)


def forgetting(results: Any, *, stage: str | int = -1, missing: str = "raise") -> Metric:
    """Mean over the tasks introduced before `stage` of max_l R[l, j] - R[stage, j], l from s(j) to the stage before (Chaudhry et al. 2018,
    eq. 3). Positive is forgetting; it may be negative. Stages that were not measured are left out of the maximum.
    """
    m = as_matrix(results)
    k = range(len(m.stages))[stage] if isinstance(stage, int) else m.stages.index(stage)

    def drop(task: str) -> float:
        before = [m.gain(i, task) for i in range(m.introduced[task], k)]
        known = [x for x in before if not math.isnan(x)]
        return max(known) - m.gain(k, task) if known else math.nan

    return _mean("forgetting", m, ((t, t) for t in m.tasks if m.introduced[t] < k), drop, missing, True)


def intransigence(results: Any, joint: Mapping[str, float], *, missing: str = "raise") -> Metric:
    """Mean of a*_j - R[s(j), j], a*_j the score of a model trained on all data up to then together (Chaudhry et al. 2018, eq. 5). Positive:
    the task was learnt less well than it could have been.
    """
    m = as_matrix(results)
    terms = [(t, t) for t in m.tasks if t in joint]
    return _mean("intransigence", m, terms, lambda t: _sign(m, t) * joint[t] - m.gain(m.introduced[t], t), missing, True)


def retention(
    results: Any, *, reference: str | int | None = None, chance: float | Mapping[str, float] = 0.0, missing: str = "raise"
) -> Metric:
    """Mean of (R[T, j] - c_j) / (R[ref, j] - c_j): the part of an ability that is left; 1 is all of it.

    Args:
        results: as for all metrics. Where lower is better the fraction is turned around: R[ref, j] / R[T, j].
        reference: a stage to compare with; by default the one that introduced the task.
        chance: the score of guessing, for all tasks or by task; where lower is better it must be 0.
        missing: as above.
    """
    m = as_matrix(results)

    def kept(task: str) -> float:
        c = chance.get(task, 0.0) if isinstance(chance, Mapping) else chance
        now, then = m.score(-1, task), m.score(m.introduced[task] if reference is None else reference, task)
        if not m.higher_is_better[task]:
            if c:
                raise ValueError(f"{task!r}: lower is better, so there is no chance level; pass chance=0 for it")
            now, then = then, now
        if then == c:
            raise ValueError(f"{task!r}: the reference score is the chance level {c}, so nothing can be said of what is left of it")
        return (now - c) / (then - c)

    return _mean("retention", m, ((t, t) for t in m.tasks), kept, missing, False)


def worst_case_accuracy(results: Any, *, missing: str = "raise") -> Metric:
    """Mean over tasks of the worst R[i, j] from s(j) on (De Lange et al. 2023), as measured: shows dips that the last stage hides."""
    m = as_matrix(results)

    def worst(task: str) -> float:
        gains = [m.gain(i, task) for i in range(m.introduced[task], len(m.stages))]
        return math.nan if any(map(math.isnan, gains)) else min(gains) * _sign(m, task)

    return _mean("worst-case accuracy", m, ((t, t) for t in m.tasks), worst, missing, True)


def normalized_improvement(merged: Mapping[str, float], base: Mapping[str, float], finetuned: Mapping[str, float]) -> Metric:
    """Of a merge: mean of (merged_j - base_j) / (finetuned_j - base_j), finetuned_j the expert's score on its own task. 1: as good as the
    experts; 0: as the base (Marczak et al. 2025, arXiv:2502.04959, normalised accuracy improvement).
    """
    tasks = list(finetuned)
    absent = [t for t in tasks if t not in merged or t not in base]
    if absent:
        raise MissingScoreError(f"merged and base need scores for {', '.join(map(repr, absent))}")
    same = [t for t in tasks if finetuned[t] == base[t]]
    if same:
        raise ValueError(f"fine-tuning changed nothing on {', '.join(map(repr, same))}; leave such tasks out")
    parts = {t: (merged[t] - base[t]) / (finetuned[t] - base[t]) for t in tasks}
    return Metric("normalised improvement", math.fsum(parts.values()) / len(parts) if parts else math.nan, parts)
