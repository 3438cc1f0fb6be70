"""Fuzz the readers of untrusted files for some minutes: python -X faulthandler -m tests.fuzz.run --minutes 5

Every input follows from its target and number, so that `--target header --only 1234` repeats one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

from .guard import guarded
from .targets import TARGETS, prepare


def attempt(name: str, number: int, folder: Path, memory: bool = False) -> str:
    """Try one input.

    Returns:
        "taken", or the name of the documented error that refused it.

    Raises:
        BaseException: whatever else came of it.
    """
    target = TARGETS[name]
    use, size = target.make(folder, Random(f"{name} {number}"))
    here = os.getcwd()
    os.chdir(folder)
    try:
        inside = () if target.reads is None else (folder / target.reads,)
        with guarded(size, inside, target.memory if memory else None, target.writes, target.resident):
            use()
    except target.documented as error:
        str(error)
        return type(error).__name__
    finally:
        os.chdir(here)
    return "taken"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="try this one input and show what comes")
    options = parser.parse_args()
    targets = options.target or list(TARGETS)
    counts: Counter = Counter()
    failures: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="pymerge-fuzz-") as text:
        folder = Path(text)
        prepare(folder)
        if options.only is not None:
            for name in targets:
                print(name, attempt(name, options.only, folder, memory=True))
            return 0
        end, number = time.monotonic() + 60 * options.minutes, options.first
        while time.monotonic() < end:
            for name in targets:
                try:
                    counts[name, attempt(name, number, folder, memory=number % 20 == 19)] += 1
                except Exception as error:
                    counts[name, "FAILED"] += 1
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    what = f"{name}: {type(error).__name__} at {where.name}:{where.lineno}: {str(error)[:200]!r}"
                    failures.setdefault(what, []).append(str(number))
            number += 1
    print(f"{sum(counts.values())} inputs in {options.minutes:g} minutes, {sum(map(len, failures.values()))} failures")
    for name in targets:
        print(f"  {name:<11}", ", ".join(f"{what} {count}" for (target, what), count in sorted(counts.items()) if target == name))
    for failure, numbers in failures.items():
        print(f"{failure}\n    inputs {', '.join(numbers[:5])}{' ...' if len(numbers) > 5 else ''}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
