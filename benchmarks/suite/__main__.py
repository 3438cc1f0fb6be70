"""Measures pymerge beside the machine's memory and beside others: `make bench`, or python -m benchmarks.suite [--quick] [--only GROUP ...]

Writes benchmarks/results/DATE-CPU.json, or .benchmarks/quick.json and .benchmarks/part.json for less than everything. Exit status 1 when
a result is wrong (it has no speed then) or a group did not end. docs/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 1500
"""Seconds after which a group's process is ended; the rows that it has measured until then count."""


def main(arguments: list[str] | None = None) -> int:
    from . import plan

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="about three minutes instead of half an hour")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="these groups only; --list names them")
    parser.add_argument("--list", action="store_true", help="print the groups and end")
    parser.add_argument("--out", type=Path, help="write the result there")
    parser.add_argument("--group", help=argparse.SUPPRESS)  # this process measures one group and writes its rows to --out
    args = parser.parse_args(arguments)
    chosen = plan.quick() if args.quick else plan.full()
    names = [group.name for group in chosen.groups]
    unknown = [name for name in [*(args.only or []), *([args.group] if args.group else [])] if name not in names]
    if unknown:
        parser.error(f"there is no group {unknown[0]!r}; there are {', '.join(map(repr, names))}")
    if args.list:
        print(*(f"{group.name}: {len(group.cases)} cases" for group in chosen.groups), sep="\n")
        return 0
    if args.group:
        return measure_group(next(group for group in chosen.groups if group.name == args.group), args.out)
    return measure_all(chosen, [name for name in names if not args.only or name in args.only], args)


def measure_all(chosen, names: list[str], args) -> int:
    """Each group in a process of its own: memory is as it is in a fresh one, and one that dies takes nothing with it."""
    from pymerge.speed import machine

    from .plan import thread_counts
    from .streams import bandwidths
    from .table import print_result

    started = time.monotonic()
    result = {
        "schema": "pymerge-suite/1", "date": f"{datetime.date.today()}", "commit": _commit(), "quick": args.quick, "groups": names,
        "machine": machine.describe(), "rivals": {name: _version(name) for name in ("mergekit", "peft", "transformers")},
        "bandwidth": [], "rows": [], "failures": [],
    }  # fmt: skip
    try:
        print("the machine's memory, read and written together:", flush=True)
        sizes = list(chosen.bandwidth_bytes)
        result["bandwidth"] = bandwidths(sizes, thread_counts(), chosen.bandwidth_seconds, lambda line: print("  " + line, flush=True))
    except (OSError, subprocess.CalledProcessError) as error:
        result["failures"].append(f"bandwidth: {error}")
        print(f"streams.cpp cannot be compiled: {error}", file=sys.stderr)
        return 1
    for name in names:
        rows, failure = _group(name, args.quick)
        result["rows"] += rows
        if failure:
            result["failures"].append(f"{name}: {failure}")
    result["seconds"] = round(time.monotonic() - started)
    default = "part" if args.only else "quick" if args.quick else None
    path = args.out or (ROOT / ".benchmarks" / f"{default}.json" if default else ROOT / f"benchmarks/results/{machine.result_name()}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)
    print(f"{path}: {len(result['rows'])} rows in {result['seconds']} s")
    for failure in result["failures"]:
        print(f"FAILED  {failure}", file=sys.stderr)
    return 1 if result["failures"] else 0


def _group(name: str, quick: bool) -> tuple[list[dict], str | None]:
    """Rows of one group, and why there are not more."""
    print(f"{name}:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        command = [sys.executable, "-m", "benchmarks.suite", "--group", name, "--out", str(rows), *(["--quick"] if quick else [])]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=TIME_LIMIT).returncode
            failure = None if status == 0 else "see above" if status == 1 else f"its process ended with status {status}"
            failure = "it was killed, for want of memory it seems" if status == -9 else failure
        except subprocess.TimeoutExpired:
            failure = f"not done after {TIME_LIMIT} s"
        lines = rows.read_text().splitlines() if rows.exists() else []
    return [json.loads(line) for line in lines], failure


def measure_group(group, out: Path) -> int:
    """In this process; a line of JSON for each row."""
    from .inputs import make_inputs
    from .logits import LogitsCase, make_logits, measure_logits
    from .measure import measure
    from .table import line
    from .verify import Wrong

    _die_first()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # its advice on formulas that it cannot compile in one piece
    first, wrong = group.cases[0], 0
    if isinstance(first, LogitsCase):
        given = make_logits(first.rows, first.vocabulary)
    else:
        given = (make_inputs(first.layout, first.elements, first.dtype, max(case.models for case in group.cases)),)
    with out.open("w") as file:
        for case in group.cases:
            began = time.monotonic()
            try:
                run = measure_logits if isinstance(case, LogitsCase) else measure
                row = run(case, *given, group.effort, lambda text: print(text, flush=True))
            except Wrong as error:
                wrong += 1
                print(f"  WRONG, so without a speed: {error}", flush=True)
                continue
            row |= {"group": group.name, "took_s": round(time.monotonic() - began, 1)}
            file.write(json.dumps(row) + "\n")
            file.flush()
            print("  " + line(row), flush=True)
    return 1 if wrong else 0


def _die_first() -> None:
    """When memory runs out, this process is what the kernel ends, not the one that collects the results."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # mergekit's imports fork
    sys.exit(main())
