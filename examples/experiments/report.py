"""What the experiments share: the command line, tables with the spread over seeds, expectations that are checked, and the files."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent.parent / "results"
Runs = dict[str, dict[str, list[float]]]
"""Arm -> measure -> a value per seed, in the order of the seeds."""


@dataclass(frozen=True)
class Expectation:
    """What was expected before the run, as a comparison of paired values, one pair per seed.

    Without `within`, `high` should be above `low`; with it, they should differ by at most that much.
    """

    text: str
    low: Sequence[float]
    high: Sequence[float]
    within: float | None = None

    def seen(self) -> dict[str, Any]:
        differences = [h - x for x, h in zip(self.low, self.high, strict=True)]
        mean = statistics.fmean(differences)
        met = sum(d > 0 if self.within is None else abs(d) <= self.within for d in differences)
        good = mean > 0 if self.within is None else abs(mean) <= self.within
        verdict = "as expected" if good and met == len(differences) else "in part" if good else "not as expected"
        return {"expected": self.text, "seen": verdict, "difference": mean, "sd": spread(differences), "seeds": met, "of": len(differences)}


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def collect(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> Runs:
    """From arm -> measure -> value of each seed to lists over seeds."""
    return {arm: {measure: [run[arm][measure] for run in runs] for measure in runs[0][arm]} for arm in runs[0]}


def table(runs: Runs, digits: int = 3) -> str:
    """Markdown: a row per arm, mean ± standard deviation over the seeds."""
    measures = list(next(iter(runs.values())))
    lines = ["| arm | " + " | ".join(measures) + " |", "|---|" + "--:|" * len(measures)]
    for arm, values in runs.items():
        cells = [f"{statistics.fmean(values[m]):.{digits}f} ± {spread(values[m]):.{digits}f}" for m in measures]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def expectations_table(expectations: Sequence[Expectation], digits: int = 3) -> str:
    lines = ["| expected | seen | difference | seeds |", "|---|---|--:|--:|"]
    for row in (e.seen() for e in expectations):
        difference = f"{row['difference']:+.{digits}f} ± {row['sd']:.{digits}f}"
        lines.append(f"| {row['expected']} | {row['seen']} | {difference} | {row['seeds']} of {row['of']} |")
    return "\n".join(lines)


@dataclass
class Experiment:
    """One experiment's run: options from the command line, and where its files go."""

    name: str
    title: str
    quick: bool
    seeds: int
    out: Path
    started: float

    @classmethod
    def start(cls, name: str, title: str) -> Experiment:
        parser = argparse.ArgumentParser(description=title)
        parser.add_argument("--seeds", type=int, default=5, help="seeds of the full form")
        parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows that it runs, not what is true")
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table, the numbers and the picture")
        options = parser.parse_args()
        torch.set_num_threads(1)
        return cls(name, title, options.quick, 1 if options.quick else options.seeds, options.out, time.perf_counter())

    def run(self, one: Callable[[int], Any]) -> list[Any]:
        """A result per seed, with a line on the terminal for each."""
        results = []
        for seed in range(self.seeds):
            results.append(one(seed))
            print(f"{self.name}: seed {seed} done after {time.perf_counter() - self.started:.0f} s", flush=True)
        return results

    def finish(
        self,
        runs: Runs,
        expectations: Sequence[Expectation],
        figure: Any,
        *,
        settings: Mapping[str, Any],
        notes: Sequence[str] = (),
        **data: Any,
    ) -> None:
        """Print the table, and write NAME.json, NAME.md and NAME.png."""
        form = (
            "quick form, one seed: a check that it runs, not evidence" if self.quick else f"{self.seeds} seeds, mean ± standard deviation"
        )
        text = "\n\n".join(
            [f"# {self.name}: {self.title}", f"{form}.", table(runs), expectations_table(expectations), "\n".join(f"* {n}" for n in notes)]
        ).rstrip()
        print(text)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.name}.md").write_text(text + "\n")
        found = {
            "experiment": self.name, "title": self.title, "seeds": self.seeds, "quick": self.quick, "settings": dict(settings),
            "runs": runs, "expectations": [e.seen() for e in expectations], "notes": list(notes), **data,
        }  # fmt: skip
        (self.out / f"{self.name}.json").write_text(json.dumps(_rounded(found), indent=1) + "\n")
        figure.savefig(self.out / f"{self.name}.png", dpi=90)
        print(f"{self.name}: {time.perf_counter() - self.started:.0f} s; files in {self.out}")


def _rounded(value: Any) -> Any:
    """Six digits: the rest is noise of the machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
