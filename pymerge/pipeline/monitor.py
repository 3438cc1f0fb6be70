"""A record of a model's stages (SFT, DPO, RL, ...) on the same probes, with a gate after each."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..metrics.gate import FAIL, INCONCLUSIVE, GateReport, RegressionGate
from ..metrics.matrix import ResultMatrix

__all__ = ["StageMonitor"]

VERSION = 1
REMEDIES = (
    "interpolate towards the stage before: pymerge.pipeline.wise_ft_search finds how far (seconds, no training)",
    "replay more of the old data in this stage: pymerge.replay.ReplayMixer",
    "a stronger KL term to the stage before: pymerge.losses.KLRegularizer",
    "train the stage again, with fewer steps or a smaller learning rate",
)
"""What to try against a regression, the cheapest first."""


class StageMonitor:
    """Scores of every stage, kept in one file that only grows: a JSON object per line, one line per stage.

    Args:
        path: of the file; what is in it already is read, so that a later process goes on.
        probes: name -> function that gets the model (whatever :meth:`record` is given) and returns scores by item, a list of 0 and 1 or of
            numbers. A verifier of formats or safety rules is a probe like any other.
        gate: that compares each stage with the one before and with the first. None compares nothing.
        introduced: the stage that trains each probe's ability; probes not named are old abilities.

    Raises:
        ValueError: the file is not such a record; names the line.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        probes: Mapping[str, Callable[[Any], Iterable[float]]] | None = None,
        gate: RegressionGate | None = None,
        introduced: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.probes = dict(probes or {})
        self.gate = gate
        self.introduced = dict(introduced or {})
        self.stages: list[dict[str, Any]] = self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        text = self.path.read_text()
        lines = text.split("\n")
        torn = lines.pop()  # what follows the last newline: nothing, or a line that was being written when the process was killed
        stages = []
        for number, line in enumerate(lines, 1):
            try:
                stage = json.loads(line)
                if stage["version"] != VERSION:
                    raise ValueError(f"version {stage['version']!r}; this pymerge reads {VERSION}")
                if not isinstance(stage["items"], dict):
                    raise ValueError("its items are no object")
                stages.append(stage)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}:{number}: is no stage record: {error}") from None
        if torn:
            warnings.warn(f"{self.path}: the last line is incomplete and was cut off; record that stage again", stacklevel=3)
            with self.path.open("r+b") as file:
                file.truncate(len(text.encode()) - len(torn.encode()))
        return stages

    def record(
        self, stage: str, model: Any = None, *, scores: Mapping[str, Iterable[float]] | None = None, notes: Mapping[str, Any] | None = None
    ) -> GateReport | None:
        """Run the probes on a model after a stage, compare, and add a line to the file.

        Args:
            stage: its name; "base" for the model before the first.
            model: passed to every probe.
            scores: by probe, scores by item measured elsewhere; these probes are not run.
            notes: anything worth keeping that JSON can hold: drift, learning rate, data.

        Returns:
            The comparison with the stage before, None for the first stage or without a gate. The one with the first stage is in the file.

        Raises:
            ValueError: the name was used before, a probe is missing or has other items than before.
        """
        if stage in self.names:
            raise ValueError(f"stage {stage!r} is recorded already; names must differ")
        given = {name: [float(x) for x in values] for name, values in (scores or {}).items()}
        unknown = sorted(set(given) - set(self.probes)) if self.probes else []
        if unknown:
            raise ValueError(f"scores of unknown probes: {', '.join(map(repr, unknown))}")
        items = {**{n: [float(x) for x in probe(model)] for n, probe in self.probes.items() if n not in given}, **given}
        self._check(items)
        previous = self._compare(self.stages[-1]["items"], items) if self.stages else None
        first = self._compare(self.stages[0]["items"], items) if len(self.stages) > 1 else None
        line = {
            "version": VERSION,
            "stage": stage,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "scores": {name: math.fsum(values) / len(values) for name, values in items.items()},
            "against_previous": previous.to_dict() if previous else None,
            "against_first": first.to_dict() if first else None,
            "notes": dict(notes or {}),
            "items": items,
        }
        self._append(line)
        return previous

    def _check(self, items: Mapping[str, list[float]]) -> None:
        if not items:
            raise ValueError("there are no probes: give probes to the monitor, or scores")
        for name, values in items.items():
            bad = next((i for i, x in enumerate(values) if not math.isfinite(x)), None)
            if not values or bad is not None:
                raise ValueError(f"probe {name!r}: " + ("no scores" if not values else f"the score of item {bad} is {values[bad]}"))
        if self.stages:
            before = self.stages[0]["items"]
            if set(before) != set(items):
                raise ValueError(f"the first stage has the probes {sorted(before)}, this one {sorted(items)}; every stage needs the same")
            for name, values in items.items():
                if len(values) != len(before[name]):
                    raise ValueError(f"probe {name!r} has {len(values)} items, the first stage {len(before[name])}: keep the items fixed")

    def _compare(self, old: Mapping, new: Mapping) -> GateReport | None:
        return self.gate.compare(old, new) if self.gate is not None else None

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.stages.append(json.loads(text))

    @property
    def names(self) -> list[str]:
        """Of the stages so far."""
        return [stage["stage"] for stage in self.stages]

    def matrix(self) -> ResultMatrix:
        """Stages by probes, for the metrics of :mod:`pymerge.metrics`.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self.stages:
            raise ValueError(f"{self.path}: nothing was recorded yet")
        probes = list(self.stages[0]["items"])
        introduced = {probe: stage for probe, stage in self.introduced.items() if stage in self.names}
        return ResultMatrix(self.names, probes, {s["stage"]: s["scores"] for s in self.stages}, introduced=introduced)

    def report(self) -> str:
        """Markdown: the table of scores, each stage's verdict, and what to try where one failed."""
        from ..metrics.report import as_text

        lines = [as_text(self.matrix()), "## Stages", ""]
        for stage in self.stages[1:]:
            verdicts = [
                f"{stage[key]['outcome']} against {name!r}"
                for key, name in (("against_previous", self._name_before(stage["stage"])), ("against_first", self.names[0]))
                if stage[key]
            ]
            lines.append(f"* {stage['stage']}: {', '.join(verdicts) or 'not compared'}")
            for key in ("against_previous", "against_first"):
                for probe in (stage[key] or {"probes": []})["probes"]:
                    if probe["outcome"] in (FAIL, INCONCLUSIVE):
                        change = f"{probe['old']:.4g} -> {probe['new']:.4g}"
                        lines.append(f"    * {probe['name']} {change}, {probe['outcome']} {key.replace('_', ' ')}")
        if any((stage[key] or {}).get("outcome") == FAIL for stage in self.stages for key in ("against_previous", "against_first")):
            lines += ["", "What to try, the cheapest first:", "", *(f"{i}. {remedy}" for i, remedy in enumerate(REMEDIES, 1))]
        return "\n".join(lines) + "\n"

    def _name_before(self, stage: str) -> str:
        return self.names[self.names.index(stage) - 1]
