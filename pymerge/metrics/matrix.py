"""The table that every metric of forgetting is computed from: one row per stage, one column per task."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["MissingScoreError", "ResultMatrix", "as_matrix"]


class MissingScoreError(ValueError):
    """A metric needs a score that was not measured."""


class ResultMatrix:
    """R[i, j], the score on task j after stage i.

    A score that was not measured is missing (NaN), never 0.

    Args:
        stages: names of the stages in the order of training, first of all the model before it ("base") if it was measured.
        tasks: names of the tasks.
        scores: a row per stage with a score per task, or a mapping of stage -> task -> score; None and NaN are missing.
        introduced: the stage that trains each task. A stage may introduce several; a task that no stage trains, a probe of old abilities,
            belongs to the first row. By default the last ``len(tasks)`` stages introduce one task each, in order; there may then be one
            stage more than tasks, before them.
        higher_is_better: for all tasks or by task. Differences of tasks where lower is better (loss, perplexity) are turned around, so that
            everywhere in this module a positive number is an improvement.
        units: "accuracy", "nats", ... for all tasks or by task. Means over tasks with different units are refused.
        stderr: standard errors in the same form as `scores`, where they are known.

    Raises:
        ValueError: the sizes do not fit, a name occurs twice, or a stage or task is not known.
    """

    def __init__(
        self,
        stages: Sequence[str],
        tasks: Sequence[str],
        scores: Any,
        *,
        introduced: Mapping[str, str] | None = None,
        higher_is_better: bool | Mapping[str, bool] = True,
        units: str | Mapping[str, str] = "score",
        stderr: Any = None,
    ) -> None:
        self.stages, self.tasks = tuple(map(str, stages)), tuple(map(str, tasks))
        for what, names in (("stage", self.stages), ("task", self.tasks)):
            twice = next((n for n in names if names.count(n) > 1), None)
            if twice is not None:
                raise ValueError(f"{what} {twice!r} occurs twice")
            if not names:
                raise ValueError(f"there is no {what}")
        self._scores = self._rows(scores, "scores")
        self._stderr = self._rows(stderr, "stderr") if stderr is not None else None
        self.introduced = self._introduced(introduced)
        self.higher_is_better = self._by_task(higher_is_better, "higher_is_better")
        self.units = self._by_task(units, "units")

    def _rows(self, table: Any, what: str) -> list[list[float]]:
        if isinstance(table, Mapping):
            unknown = sorted(set(table) - set(self.stages)) + sorted({t for row in table.values() for t in row} - set(self.tasks))
            if unknown:
                raise ValueError(f"{what}: unknown {', '.join(map(repr, unknown))}")
            table = [[table.get(stage, {}).get(task) for task in self.tasks] for stage in self.stages]
        rows = [[math.nan if x is None else float(x) for x in row] for row in table]
        if len(rows) != len(self.stages) or any(len(row) != len(self.tasks) for row in rows):
            sizes = sorted({len(row) for row in rows})
            raise ValueError(f"{what}: {len(rows)} rows of {sizes} numbers, for {len(self.stages)} stages and {len(self.tasks)} tasks")
        return rows

    def _introduced(self, given: Mapping[str, str] | None) -> dict[str, int]:
        if given is None:
            before = len(self.stages) - len(self.tasks)
            if before not in (0, 1):
                raise ValueError(
                    f"{len(self.stages)} stages and {len(self.tasks)} tasks: say which stage introduces each task, as "
                    "introduced={task: stage}"
                )
            return {task: before + j for j, task in enumerate(self.tasks)}
        unknown = sorted(set(given) - set(self.tasks)) + sorted(set(given.values()) - set(self.stages))
        if unknown:
            raise ValueError(f"introduced: unknown {', '.join(map(repr, unknown))}")
        return {task: self.stages.index(given[task]) if task in given else 0 for task in self.tasks}

    def _by_task(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return dict.fromkeys(self.tasks, value)
        missing = [task for task in self.tasks if task not in value]
        if missing or set(value) - set(self.tasks):
            raise ValueError(f"{what}: give one value, or one for each of {', '.join(map(repr, self.tasks))}")
        return dict(value)

    # ---- reading

    def score(self, stage: str | int, task: str) -> float:
        """R[stage, task] as measured; NaN when it was not."""
        return self._scores[self._stage(stage)][self.tasks.index(task)]

    def stderr(self, stage: str | int, task: str) -> float:
        """Its standard error; NaN when it is not known."""
        return self._stderr[self._stage(stage)][self.tasks.index(task)] if self._stderr is not None else math.nan

    def gain(self, stage: str | int, task: str) -> float:
        """The score turned such that more is better."""
        score = self.score(stage, task)
        return score if self.higher_is_better[task] else -score

    def _stage(self, stage: str | int) -> int:
        if isinstance(stage, str):
            if stage not in self.stages:
                raise ValueError(f"there is no stage {stage!r}; there are {', '.join(map(repr, self.stages))}")
            return self.stages.index(stage)
        return range(len(self.stages))[stage]

    @property
    def missing(self) -> list[tuple[str, str]]:
        """(stage, task) of the scores that were not measured."""
        return [(s, t) for s in self.stages for t in self.tasks if math.isnan(self.score(s, t))]

    def common_unit(self, tasks: Iterable[str]) -> None:
        """Raise unless a mean over these tasks makes sense.

        Raises:
            ValueError: their units or directions differ.
        """
        kinds = {t: (self.units[t], "higher" if self.higher_is_better[t] else "lower") for t in tasks}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{t!r} is in {u} ({d} is better)" for t, (u, d) in kinds.items())
            raise ValueError(f"a mean over different units says nothing: {listed}; choose tasks of one unit, or normalise first")

    def only(self, tasks: Sequence[str]) -> ResultMatrix:
        """The same with these tasks only."""
        unknown = [t for t in tasks if t not in self.tasks]
        if unknown:
            raise ValueError(f"unknown {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, self.tasks))}")
        return ResultMatrix(
            self.stages,
            tasks,
            [[self.score(s, t) for t in tasks] for s in self.stages],
            introduced={t: self.stages[self.introduced[t]] for t in tasks},
            higher_is_better={t: self.higher_is_better[t] for t in tasks},
            units={t: self.units[t] for t in tasks},
            stderr=[[self.stderr(s, t) for t in tasks] for s in self.stages],
        )

    # ---- files

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; missing scores are None."""

        def plain(table):
            return [[None if math.isnan(x) else x for x in row] for row in table]

        result = {
            "stages": list(self.stages),
            "tasks": list(self.tasks),
            "scores": plain(self._scores),
            "introduced": {task: self.stages[i] for task, i in self.introduced.items()},
            "higher_is_better": self.higher_is_better,
            "units": self.units,
        }
        return result if self._stderr is None else {**result, "stderr": plain(self._stderr)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ResultMatrix:
        """The inverse of :meth:`to_dict`."""
        keys = {"stages", "tasks", "scores", "introduced", "higher_is_better", "units", "stderr"}
        if not isinstance(data, Mapping) or not {"stages", "tasks", "scores"} <= set(data) <= keys:
            raise ValueError(
                f"not a result matrix: a JSON object with stages, tasks, scores and, if need be, {', '.join(sorted(keys)[:5])}"
            )
        return cls(**data)

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> ResultMatrix:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is not that; the message names the file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def as_matrix(results: Any) -> ResultMatrix:
    """A matrix from a matrix or from rows of numbers, tasks introduced one by one."""
    if isinstance(results, ResultMatrix):
        return results
    rows = [list(row) for row in (results.tolist() if hasattr(results, "tolist") else results)]
    columns = len(rows[0]) if rows else 0
    stages = [f"stage {i}" for i in range(len(rows))]
    return ResultMatrix(stages, [f"task {j + 1}" for j in range(columns)], rows)
