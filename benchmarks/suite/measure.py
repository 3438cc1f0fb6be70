"""One row of the report: a method on given tensors, verified, then timed in turn with its rivals and with the machine's ceiling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pymerge.speed.ceiling import elapsed_ms
from pymerge.speed.memory import available_bytes, extra_bytes
from pymerge.speed.rounds import Contender, Times, interleave, ratio

from .inputs import Inputs, tensors
from .methods import METHODS
from .rivals import Missing, Rival, rivals_of
from .streams import StreamCeiling
from .verify import agreement, slope, verify

__all__ = ["Case", "Effort", "measure", "timed"]

FEWEST = 5
SLOPE = 0.02
"""Two random drops of a million elements and more are this near to each other in how much of the deltas they keep (a standard deviation
is 0.1 % there)."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: at most; at least :data:`FEWEST`.
        seconds: for pymerge; the ways to move bytes get as many rounds.
        rival_seconds: for each rival; each runs once at least.
    """

    rounds: int = 31
    seconds: float = 1.5
    rival_seconds: float = 5.0


@dataclass(frozen=True)
class Case:
    """One row: a method, the tensors that `inputs.make_inputs` makes, the fraction kept, threads, and the kinds of rivals."""

    method: str
    layout: str
    elements: int
    dtype: str
    models: int
    density: float
    threads: int
    rivals: tuple[str, ...] = ()


def measure(case: Case, inputs: Inputs, effort: Effort, say: Callable[[str], None] = lambda line: None) -> dict:
    """Raises verify.Wrong when pymerge's result is wrong. A rival that is wrong, missing or too large has an entry that says so."""
    torch.set_num_threads(case.threads)
    method = METHODS[case.method]
    inputs = method.prepared(inputs.first(case.models))
    before = [x.clone() for x in tensors(inputs.out)] if method.updates else None

    def ours() -> object:
        return method.run(inputs, case.density)

    extra = extra_bytes(ours)
    if before is not None:
        _put_back(inputs, before)
    verified = verify(case.method, inputs, case.density)
    rivals = [entry for kind in case.rivals for entry in _compared(kind, case, inputs, before, say)]
    row = {
        "method": case.method,
        "layout": case.layout,
        "elements": inputs.elements,
        "tensors": len(tensors(inputs.out)),
        "dtype": case.dtype,
        "models": len(inputs.models),
        "density": case.density if case.method.startswith(("ties", "dare")) else None,
        "threads": case.threads,
        "extra_bytes": extra,
        "verified": verified,
    }
    if inputs.layout != "one" and method.writes:
        whole = _in_one(inputs)
        rivals.append({"kind": "one tensor", "rival": "pymerge, one tensor", "run": (lambda: method.run(whole, case.density), 0.0)})
    moved, streams = method.traffic(inputs)
    return row | timed(ours, moved, streams, method.writes, rivals, effort)


def timed(ours: Callable[[], object], moved: int, streams: int, writes: bool, rivals: list[dict], effort: Effort) -> dict:
    """Time `ours`, the ways to move `moved` bytes and the rivals that have a `run`, in turn; the row's measured part.

    Args:
        rivals: entries as :func:`_compared` gives them; they leave with their times, or why they have none.
    """
    ceiling = StreamCeiling(moved, streams, writes)

    def enough(times: dict[str, Times]) -> bool:
        return len(times["pymerge"].ms) >= FEWEST and sum(times["pymerge"].ms) > 1e3 * effort.seconds

    try:
        running = {entry["rival"]: entry.pop("run") for entry in rivals if "run" in entry}
        times = interleave(
            {
                **{name: Contender(run, effort.rival_seconds, entry_ms) for name, (run, entry_ms) in running.items()},
                **{name: Contender(run, math.inf) for name, run in ceiling.ways.items()},
                "pymerge": Contender(ours, math.inf),
            },
            max(effort.rounds, FEWEST),
            enough,
        )
        ways = {name: Times([ceiling.scale(name) * ms for ms in times[name].ms]) for name in ceiling.ways}
    finally:
        ceiling.close()
    way = min(ways, key=lambda name: ways[name].median)
    t, copy = times["pymerge"], ways[way]
    for entry in rivals:
        if entry["rival"] in running:
            other = times[entry["rival"]]
            entry |= {"ms": other.median, "rounds": len(other.ms), "speedup": ratio(other, t)}
    return {
        "bytes": moved, "ms": t.median, "best_ms": t.best, "quartiles_ms": t.quartiles, "rounds": len(t.ms),
        "gb_per_s": moved / t.median / 1e6, "copy_ms": copy.median, "copy_way": way, "copy_gb_per_s": moved / copy.median / 1e6,
        "to_copy": ratio(t, copy), "rivals": rivals,
    }  # fmt: skip


def _compared(kind: str, case: Case, inputs: Inputs, before, say: Callable[[str], None]) -> list[dict]:
    """One entry for the fastest program of a kind, with `run`; or why there is none."""
    ours = [x.clone() for x in tensors(inputs.out)]
    if before is not None:
        _put_back(inputs, before)
    try:
        found = rivals_of(kind, case.method, inputs, case.density)
        entries = [_tried(rival, case, inputs, ours) for rival in found]
    except Missing as missing:
        return [{"kind": kind, "rival": kind, "skipped": str(missing)}]
    finally:
        _put_back(inputs, ours)
    for entry in entries:
        say(f"    {kind}: {entry['rival']}: {entry.get('skipped') or '{:.1f} ms'.format(entry['run'][1])}")
    right = [entry for entry in entries if "run" in entry]
    if not right:
        return [{"kind": kind, **entry} for entry in entries]
    best = min(right, key=lambda entry: entry["run"][1])
    others = {entry["rival"]: entry["skipped"] if "skipped" in entry else entry["run"][1] for entry in entries if entry is not best}
    return [{"kind": kind, **best, "others": others}]


def _in_one(inputs: Inputs) -> Inputs:
    """All tensors of each model in one, to see what having many of them costs."""
    base, out, *models = (torch.cat([t.reshape(-1) for t in tensors(x)]) for x in (inputs.base, inputs.out, *inputs.models))
    return Inputs(base, models, out, "one", inputs.dtype)


def _put_back(inputs: Inputs, values: list[torch.Tensor]) -> None:
    for x, y in zip(tensors(inputs.out), values):
        x.copy_(y)


def _tried(rival: Rival, case: Case, inputs: Inputs, ours: list[torch.Tensor]) -> dict:
    """Run once and compare: `run` is the program and the milliseconds that it took; `skipped` says why there is no such."""
    entry: dict = {"rival": rival.label}
    need, there = rival.bytes_per_element * inputs.elements, available_bytes()
    if there and need > there:
        return entry | {"skipped": f"needs about {need / 1e9:.0f} GB, and {there / 1e9:.0f} GB are free"}
    result: list = []
    ms = 0.0

    def run() -> None:
        nonlocal ms
        ms = elapsed_ms(lambda: result.append(rival.run()))

    try:
        if rival.prepare is not None:
            rival.prepare()
        entry["extra_bytes"] = extra_bytes(run)
    except Exception as error:  # no memory, no compiler: a rival that does not run has no time, and that is no reason to stop
        first = str(error).splitlines()[0][:160] if str(error) else ""
        return entry | {"skipped": f"{type(error).__name__}: {first}"}
    if case.method != "diagnose":
        got = result[0] if isinstance(result[0], list) else tensors(result[0])
        entry |= _agreement(rival, inputs, got, ours)
    return entry if "skipped" in entry else entry | {"run": (rival.run, ms)}


def _agreement(rival: Rival, inputs: Inputs, got: list[torch.Tensor], ours: list[torch.Tensor]) -> dict:
    if rival.random:
        parts = tensors(inputs.base), [tensors(x) for x in inputs.models]
        theirs = slope(got, *parts) / slope(ours, *parts)
        result = {"agrees": f"drops of its own; {theirs:.4f} of pymerge's merged delta"}
        return result if abs(theirs - 1) <= SLOPE else result | {"skipped": "its result is another"}
    sizes = [x.numel() for x in ours]
    fraction = sum(agreement(a, b) * n for a, b, n in zip(got, ours, sizes)) / sum(sizes)
    result = {"agrees": fraction}
    return (
        result if fraction >= rival.least else result | {"skipped": f"its result is another: {100 * fraction:.1f} % of the elements agree"}
    )
