"""Has a kernel become slower? Its time over that of a copy in the same process, against committed ratios: never absolute times.

    python -m benchmarks.check.ratios              exit status 1 when a kernel lost more than 30 % of its speed
    python -m benchmarks.check.ratios --update     write this machine's ratios into expected_ratios.json

What makes it quiet on a machine that is not:

* one thread, and its own time: what another program takes of the core between is not counted. On data that stays in a core's own cache
  ("64k") others hardly disturb it. For each kernel the fastest round counts, of the copy too; both meet the same machine, in turn.
* a kernel that seems slow is measured again, up to four times as long, before it counts; the fastest round of all of them is taken.
* "16M" elements do not fit in a cache: this watches streaming stores and the passes over memory, which is shared with whoever else is on
  the machine. A kernel that computes for longer than its bytes take to be copied does not feel that, its copy does; so the yardstick here
  is the longer of the copy and of the time that the committed "64k" ratio gives for as many elements.

Ratios differ between CPUs of one instruction set too, so they are kept per CPU (vendor, family, model) and instruction set. On a CPU
without committed ratios nothing is compared, and that is said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pymerge import native
from pymerge.speed import machine

from .kernels import KERNELS, Kernel, Tensors

__all__ = ["ALLOWED_DROP", "compare", "fastest", "judge"]

EXPECTED = Path(__file__).with_name("expected_ratios.json")
ALLOWED_DROP = 0.30
SMALL, LARGE = 2**16, 2**24
"""Elements: in a core's own cache, and in none."""
SECONDS = {SMALL: 0.06, LARGE: 0.4}
"""For a kernel and its copy, and at least :data:`ROUNDS` rounds."""
ROUNDS = 5
AGAIN = 3
"""How often a kernel that seems slow is measured again, and the seconds to wait before: what slows it may be over then."""
PAUSE = 1.0
SWEEPS = 3
"""How often --update measures everything; the medians are committed."""


def fastest(run: Callable[[], object], yardstick: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Nanoseconds of this thread's work, not of its waiting for a core, in the fastest of the runs of each that fit in `seconds`, in turn;
    each comes after one that is not timed."""
    best, rounds, end = [float("inf"), float("inf")], 0, time.monotonic() + seconds
    while rounds < ROUNDS or time.monotonic() < end:
        rounds += 1
        for i, program in enumerate((run, yardstick)):
            program()
            began = time.thread_time_ns()
            program()
            best[i] = min(best[i], time.thread_time_ns() - began)
    return best[0], best[1]


def judge(expected: float | None, ratio: float) -> str:
    """What a ratio of times means beside the committed one: "slow", "fast" (commit the new one), "new" or "as expected"."""
    if expected is None:
        return "new"
    if expected / ratio < 1 - ALLOWED_DROP:
        return "slow"
    return "fast" if ratio / expected < 1 - ALLOWED_DROP else "as expected"


def compare(expected: float | None, measure: Callable[[], tuple[float, float]], at_least: float = 0.0) -> tuple[float, float, str]:
    """Measure a kernel until it is not slow, or has had all its chances.

    Args:
        expected: committed ratio.
        measure: `fastest` of the kernel and of the copy.
        at_least: nanoseconds that the yardstick has.

    Returns:
        The ratio, the yardstick's nanoseconds, and what `judge` says.
    """
    kernel, copy = measure()
    for _ in range(AGAIN):
        if judge(expected, kernel / max(copy, at_least)) != "slow":
            break
        time.sleep(PAUSE)
        again = measure()
        kernel, copy = min(kernel, again[0]), min(copy, again[1])
    yardstick = max(copy, at_least)
    return kernel / yardstick, yardstick, judge(expected, kernel / yardstick)


def measure_all(expected: dict[str, dict[str, float]]) -> dict[str, dict[str, tuple[float, str]]]:
    """Every kernel by instruction set: (ratio, judgement). The large size for the instruction set in use only.

    Args:
        expected: by instruction set and kernel.
    """
    found: dict[str, dict[str, tuple[float, str]]] = {}
    threads, used = torch.get_num_threads(), native.current_isa()
    small, large = Tensors(SMALL), Tensors(LARGE)
    torch.set_num_threads(1)
    try:
        for isa in native.available_isas():
            native.use_isa(isa)
            rows, known = found.setdefault(isa, {}), expected.get(isa, {})
            for name, kernel in KERNELS.items():

                def measure(tensors: Tensors, kernel: Kernel = kernel) -> tuple[float, float]:
                    source, target = torch.ones(2, tensors.n * kernel.bytes // 2, dtype=torch.uint8)
                    return fastest(lambda: kernel.run(tensors), lambda: target.copy_(source), SECONDS[tensors.n])

                key = f"{name} 64k"
                ratio, copy, judgement = compare(known.get(key), lambda: measure(small))
                rows[key] = ratio, judgement
                if isa == used:
                    computing = LARGE / SMALL * copy * known.get(key, ratio)
                    ratio, _, judgement = compare(known.get(f"{name} 16M"), lambda: measure(large), computing)
                    rows[f"{name} 16M"] = ratio, judgement
    finally:
        native.use_isa(used)
        torch.set_num_threads(threads)
    return found


def cpu() -> str:
    about = machine.describe()
    return f"{about['os'].split()[-1]} {machine.vendor()} {about['family_model']}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="commit what this machine measures; best when it is quiet")
    args = parser.parse_args(arguments)
    committed = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    name, began = cpu(), time.monotonic()
    if args.update:
        sweeps = [measure_all({}) for _ in range(SWEEPS)]
        found = {
            isa: {key: round(statistics.median(sweep[isa][key][0] for sweep in sweeps), 2) for key in rows}
            for isa, rows in sweeps[0].items()
        }
        committed[name] = found
        EXPECTED.write_text(json.dumps(dict(sorted(committed.items())), indent=1) + "\n")
        print(f"{EXPECTED}: {sum(map(len, found.values()))} ratios of {name}")
        return 0
    expected = committed.get(name)
    if expected is None:
        print(f"speed ratios: SKIPPED, none are committed for this CPU ({name}); --update measures them")
        return 0
    found = measure_all(expected)
    slow = []
    for isa, rows in found.items():
        for key, (ratio, judgement) in rows.items():
            known = expected.get(isa, {}).get(key)
            text = f"{isa} {key}: {ratio:.2f} times its yardstick" + (f", {known:.2f} expected" if known is not None else "")
            if judgement == "slow":
                slow.append(text)
            if judgement != "as expected":
                print(f"speed ratios: {judgement.upper()}: {text}" + (" (--update commits it)" if judgement != "slow" else ""))
    missing = [f"{isa} {key}" for isa, rows in expected.items() for key in rows if key not in found.get(isa, {})]
    if missing:
        print(f"speed ratios: not measured here: {', '.join(missing)}")
    count = sum(map(len, found.values()))
    kept = f"{count - len(slow)} of {count} kernels have at least {1 - ALLOWED_DROP:.0%} of their speed"
    print(f"speed ratios: {kept} ({time.monotonic() - began:.0f} s)")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
