"""Results of lm-evaluation-harness: read from its folders, and compared only where they can be.

Its ``results_<date>.json`` has, per task, scores under ``"<metric>,<filter>"`` and what they depend on: the task's version, the number of
shots, a limit on the items, a hash of the task. ``samples_<task>_<date>.jsonl``, written with ``--log_samples``, has every item's score.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .matrix import ResultMatrix

__all__ = ["EvalRun", "IncomparableRunsError", "Probes", "TaskScore", "load_lm_eval", "matrix_of", "probes_of"]

Key = tuple[str, str, str]  # task, metric, filter


class IncomparableRunsError(ValueError):
    """Two runs did not measure the same thing. The message lists what differs."""


@dataclass(frozen=True)
class TaskScore:
    """One number of a run and what it depends on; None where the file does not say."""

    value: float
    stderr: float
    higher_is_better: bool
    version: Any = None
    shots: Any = None
    items: int | None = None
    task_hash: str | None = None


@dataclass(frozen=True)
class EvalRun:
    """One evaluation of one model.

    Attributes:
        path: the results file.
        model: as the file names it.
        limit: on the items per task.
        scores: (task, metric, filter) -> :class:`TaskScore`; groups, whose tasks are there too, are left out.
        samples: (task, metric, filter) -> document id -> (hash of the document, score), where samples were logged.
    """

    path: Path
    model: str
    limit: Any
    scores: dict[Key, TaskScore]
    samples: dict[Key, dict[str, tuple[str | None, float]]] = field(default_factory=dict)


def load_lm_eval(path: str | os.PathLike) -> EvalRun:
    """Read a results file, or the newest in a folder (and the samples beside it).

    Raises:
        ValueError: there is none, or it is not such a file; names the file and what is wrong.
    """
    path = Path(path)
    if path.is_dir():
        # The date in the name sorts as text.
        found = sorted(path.rglob("results_*.json"), key=lambda p: p.name) or sorted(path.glob("results.json"))
        if not found:
            raise ValueError(f"{path}: holds no results_*.json")
        path = found[-1]
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, Mapping) or not isinstance(data.get("results"), Mapping):
        raise ValueError(f"{path}: is no result of lm-evaluation-harness: it has no 'results' object")
    groups = set(data.get("groups") or {}) | {g for g, tasks in (data.get("group_subtasks") or {}).items() if tasks}
    scores: dict[Key, TaskScore] = {}
    for task, row in data["results"].items():
        if task in groups:
            continue
        for key, value in row.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or metric in ("alias", "sample_len", "name", "sample_count") or not _number(value):
                continue
            error = row.get(f"{metric}_stderr{',' + filtered if filtered else ''}")
            counts = (data.get("n-samples") or {}).get(task) or {}
            scores[task, metric, filtered] = TaskScore(
                float(value),
                float(error) if _number(error) else math.nan,
                _direction(data, task, metric),
                (data.get("versions") or {}).get(task),
                (data.get("n-shot") or {}).get(task),
                counts.get("effective", row.get("sample_len")),
                (data.get("task_hashes") or {}).get(task),
            )
    if not scores:
        raise ValueError(f"{path}: has no scores")
    config = data.get("config") or {}
    model = str(data.get("model_name") or config.get("model_args") or config.get("model") or path.parent.name)
    return EvalRun(path, model, config.get("limit"), scores, _samples(path, scores))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _direction(data: Mapping, task: str, metric: str) -> bool:
    known = ((data.get("higher_is_better") or {}).get(task) or {}).get(metric)
    # Old files do not say; these are the harness's metrics of which less is better.
    lower = metric == "ter" or any(word in metric for word in ("perplexity", "bits_per_byte", "loss", "brier"))
    return bool(known) if known is not None else not lower


def _samples(path: Path, scores: Mapping[Key, TaskScore]) -> dict[Key, dict[str, tuple[str | None, float]]]:
    date = path.stem.removeprefix("results")
    found: dict[Key, dict[str, tuple[str | None, float]]] = {}
    for task in dict.fromkeys(task for task, _, _ in scores):
        file = path.with_name(f"samples_{task}{date}.jsonl")
        if not file.is_file():
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                document = str(row["doc_id"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}:{number}: is no sample of lm-evaluation-harness") from None
            for key in scores:
                if key[0] == task and key[2] in (row.get("filter", ""), "") and _is_score(row.get(key[1])):
                    found.setdefault(key, {})[document] = (row.get("doc_hash"), float(row[key[1]]))
    return found


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float, bool))


def _differences(a: EvalRun, b: EvalRun, keys: list[Key]) -> list[str]:
    found = [] if a.limit == b.limit else [f"limit is {a.limit} and {b.limit}"]
    for key in keys:
        one, other = a.scores[key], b.scores[key]
        for what, attribute in (
            ("version", "version"),
            ("number of shots", "shots"),
            ("task hash", "task_hash"),
            ("number of items", "items"),
        ):
            x, y = getattr(one, attribute), getattr(other, attribute)
            if x is not None and y is not None and x != y:
                found.append(f"{key[0]}: {what} is {x} and {y}")
    return list(dict.fromkeys(found))


def _common(runs: list[EvalRun], tasks: Any = None) -> list[Key]:
    keys = [k for k in runs[0].scores if all(k in run.scores for run in runs) and (tasks is None or k[0] in tasks)]
    if not keys:
        raise IncomparableRunsError(f"{', '.join(str(run.path) for run in runs)} have no score in common")
    first: dict[str, Key] = {}
    for key in keys:  # a task's main metric comes first in the file
        first.setdefault(key[0], key)
    return list(first.values())


def _require_comparable(runs: list[EvalRun], keys: list[Key]) -> None:
    for run in runs[1:]:
        found = _differences(runs[0], run, keys)
        if found:
            raise IncomparableRunsError(
                f"{runs[0].path} and {run.path} did not measure the same: {'; '.join(found)}. Evaluate again under the same settings"
            )


@dataclass(frozen=True)
class Probes:
    """What :meth:`pymerge.metrics.RegressionGate.compare` takes.

    Attributes:
        old, new: by task, its first metric: scores by item where both runs logged samples of the same documents, else (mean, standard
            error, items).
        higher_is_better: by task.
        unjudged: tasks that have neither samples nor standard errors in both runs.
    """

    old: dict[str, Any]
    new: dict[str, Any]
    higher_is_better: dict[str, bool]
    unjudged: tuple[str, ...]


def probes_of(old: EvalRun, new: EvalRun, tasks: Any = None) -> Probes:
    """Two runs made ready for a gate.

    Raises:
        IncomparableRunsError: versions, shots, limits, items or documents differ, or nothing is in common.
    """
    keys = _common([old, new], tasks)
    _require_comparable([old, new], keys)
    probes, unjudged = Probes({}, {}, {}, ()), []
    for key in keys:
        task, scores = key[0], [run.scores[key] for run in (old, new)]
        a, b = old.samples.get(key), new.samples.get(key)
        if a and b:
            changed = [d for d in a if d in b and a[d][0] is not None and b[d][0] is not None and a[d][0] != b[d][0]]
            if set(a) != set(b) or changed:
                sizes = f"{len(a)} and {len(b)}, {len(changed)} changed"
                raise IncomparableRunsError(f"{task}: the samples are not of the same documents ({sizes})")
            probes.old[task], probes.new[task] = [a[d][1] for d in a], [b[d][1] for d in a]
        elif any(math.isnan(score.stderr) for score in scores):
            unjudged.append(task)
            continue
        else:
            probes.old[task], probes.new[task] = ((s.value, s.stderr, s.items or 0) for s in scores)
        probes.higher_is_better[task] = scores[0].higher_is_better
    return Probes(probes.old, probes.new, probes.higher_is_better, tuple(unjudged))


def matrix_of(runs: Mapping[str, EvalRun], introduced: Mapping[str, str] | None = None) -> ResultMatrix:
    """A :class:`ResultMatrix` of runs by stage, with each task's first metric; the first stage is the model before training.

    Raises:
        IncomparableRunsError: as :func:`probes_of`.
    """
    stages, all_runs = list(runs), list(runs.values())
    keys = _common(all_runs)
    _require_comparable(all_runs, keys)
    return ResultMatrix(
        stages,
        [key[0] for key in keys],
        [[run.scores[key].value for key in keys] for run in all_runs],
        introduced=introduced or {},
        higher_is_better={key[0]: all_runs[0].scores[key].higher_is_better for key in keys},
        units={key[0]: key[1] for key in keys},
        stderr=[[run.scores[key].stderr for key in keys] for run in all_runs],
    )
