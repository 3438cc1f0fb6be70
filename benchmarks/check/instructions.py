"""Has an inner loop grown? Instructions per element, counted by callgrind, against committed counts: they do not depend on who else runs.

    python -m benchmarks.check.instructions            exit status 1 when a kernel takes more than 10 % more instructions
    python -m benchmarks.check.instructions --update   write this compiler's counts into expected_instructions.json

The calls of the C++ core are recorded here, with their tensors, and replayed under callgrind by a Python without torch, which would take
minutes to start there. Each call is made at two sizes; the difference of the counts over that of the sizes is what an element costs.
Valgrind does not know AVX-512, so the kernels of the other instruction sets are counted: they come from the same source
(csrc/kernels), and what only AVX-512 has is seen by ratios.py. Counts are committed per architecture and compiler. Without valgrind, or
with another compiler, nothing is compared, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from pymerge import native, native_diagnose, native_kl
from pymerge.speed import machine

from .kernels import KERNELS, Tensors

__all__ = ["ALLOWED_GROWTH", "compiler", "count", "problem"]

EXPECTED = Path(__file__).with_name("expected_instructions.json")
ALLOWED_GROWTH = 0.10
SIZES = (2**17, 2**18)
"""Whole chunks of the core, so that the difference is made of them alone."""
WITHOUT = ("avx512",)
"""Instruction sets that valgrind has not."""

MARKS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def problem() -> str | None:
    """Why instructions cannot be counted here."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    done = subprocess.run([_cc(), "-E", "-x", "c", "-"], input="#include <valgrind/callgrind.h>", capture_output=True, text=True)
    return None if done.returncode == 0 else "the C compiler does not find valgrind/callgrind.h"


def _cc() -> str:
    return os.environ.get("CC", "cc")


def compiler() -> str:
    """Architecture, compiler and its major version: "x86_64 gcc 12". Counts of another one are others."""
    text = machine.describe()["compiler"]
    found = re.search(r"(\d+)\.\d+\.\d+", text)
    return f"{platform.machine()} {'clang' if 'clang' in text else 'gcc'} {found.group(1) if found else '?'}"


class _Recorder:
    """Stands before the core and writes down what is called, with addresses as places in `buffers`, counted from `first` on."""

    def __init__(self, tensors: Tensors, first: int) -> None:
        self._first = first
        self._core, self._n = native._core, tensors.n
        self.calls: list[tuple[str, list]] = []
        self._tensors, self._places = list(tensors.all()), {}
        self.buffers: list[torch.Tensor] = []

    def __getattr__(self, function: str):
        def recorded(*arguments):
            self.calls.append((function, [self._plain(x) for x in arguments]))
            return getattr(self._core, function)(*arguments)

        return recorded

    def _plain(self, value):
        if isinstance(value, tuple):
            return {"tuple": [self._plain(x) for x in value]}
        if isinstance(value, list):
            return [self._plain(x) for x in value]
        if isinstance(value, dict):
            return {key: self._plain(x) for key, x in value.items()}
        if isinstance(value, int) and not isinstance(value, bool) and value > 2**32:
            return {"buffer": self._place(value)}
        return value

    def _place(self, address: int) -> int:
        if address not in self._places:
            known = [t for t in self._tensors if t.data_ptr() == address]
            # What the call allocated itself is an output: as many bytes as the largest of the tensors has are enough for it.
            self._places[address] = self._first + len(self.buffers)
            self.buffers.append(known[0] if known else torch.zeros(self._n))
        return self._places[address]


def _record(folder: Path, isas: list[str]) -> None:
    """Every kernel's call at both sizes, and the tensors, into `folder`."""
    calls, buffers = [], []
    for n in SIZES:
        tensors = Tensors(n)
        for name, kernel in KERNELS.items():
            recorder = _Recorder(tensors, len(buffers))
            with mock.patch.object(native, "_core", recorder), mock.patch.object(native_kl, "_core", recorder):
                with mock.patch.object(native_diagnose, "_core", recorder):
                    kernel.run(tensors)
            calls += [{"kernel": name, "elements": n, "function": f, "arguments": given} for f, given in recorder.calls]
            buffers += recorder.buffers
    for i, t in enumerate(buffers):
        (folder / f"{i}.bin").write_bytes(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    content = {"module": native._core.__file__, "isas": isas, "buffers": [t.nbytes for t in buffers], "calls": calls}
    (folder / "calls.json").write_text(json.dumps(content))


def count() -> dict[str, dict[str, float]]:
    """Instructions per element, by instruction set and kernel.

    Raises:
        RuntimeError: callgrind fails.
    """
    isas, threads = [isa for isa in native.available_isas() if isa not in WITHOUT], torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.set_num_threads(1)
        try:
            _record(folder, isas)
        finally:
            torch.set_num_threads(threads)
        (folder / "marks.c").write_text(MARKS)
        subprocess.run([_cc(), "-O1", "-shared", "-fPIC", "-o", folder / "marks.so", folder / "marks.c"], check=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts"]
        command += [sys.executable, str(Path(__file__).with_name("replay.py")), str(folder)]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONMALLOC": "malloc"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"callgrind ended with status {done.returncode}: {done.stderr[-2000:]}")
        totals = [_total(path) for path in folder.glob("counts.*")]
    counted: dict[tuple[str, str], dict[int, int]] = {}
    for label, total in filter(None, totals):
        isa, kernel, n = label.split("/")
        counted.setdefault((isa, kernel), {}).setdefault(int(n), total)
    result: dict[str, dict[str, float]] = {isa: {} for isa in isas}
    small, large = SIZES
    for (isa, kernel), by_size in sorted(counted.items()):
        result[isa][kernel] = round((by_size[large] - by_size[small]) / (large - small), 2)
    return result


def _total(path: Path) -> tuple[str, int] | None:
    """Which call a dump of callgrind is of, and its instructions."""
    text = path.read_text()
    label = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
    total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
    return (label.group(1), int(total.group(1))) if label and total else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="commit the counts of this compiler")
    args = parser.parse_args(arguments)
    why, began = problem(), time.monotonic()
    if why:
        print(f"instruction counts: SKIPPED, {why}")
        return 1 if args.update else 0
    committed = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    name = compiler()
    if name not in committed and not args.update:
        print(f"instruction counts: SKIPPED, none are committed for this compiler ({name}); --update counts them")
        return 0
    counts = count()
    if args.update:
        committed[name] = counts
        EXPECTED.write_text(json.dumps(dict(sorted(committed.items())), indent=1) + "\n")
        print(f"{EXPECTED}: {sum(map(len, counts.values()))} counts of {name}")
        return 0
    grown = 0
    for isa, kernels in committed[name].items():
        for kernel, expected in kernels.items():
            found = counts.get(isa, {}).get(kernel)
            if found is None:
                print(f"instruction counts: not counted here: {isa} {kernel}")
            elif found > expected * (1 + ALLOWED_GROWTH):
                grown += 1
                print(f"instruction counts: GROWN: {isa} {kernel}: {found} instructions per element, {expected} expected")
            elif found < expected * (1 - ALLOWED_GROWTH):
                print(f"instruction counts: fewer: {isa} {kernel}: {found} per element, {expected} expected (--update commits it)")
    total = sum(map(len, counts.values()))
    kept = f"{total - grown} of {total} kernels take at most {ALLOWED_GROWTH:.0%} more than expected"
    print(f"instruction counts: {kept} ({time.monotonic() - began:.0f} s)")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
