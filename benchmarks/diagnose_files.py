"""Time `pymerge diagnose` on files beside reading them with the same reader, and the fused reduction beside separate torch operations.

    python benchmarks/make_checkpoints.py /tmp/bench
    python benchmarks/diagnose_files.py /tmp/bench

The reads, the pass and the whole command (a process of its own) are timed in turn, the fastest of each: wall time, and CPU time of all
threads, which other programs disturb less. Files are warm in the page cache; with --cold they are dropped from it before each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import baselines
import torch

from pymerge.checkpoint.plan import Plan, make_plan
from pymerge.diagnose_ops import diagnose, new_statistics
from pymerge.diagnostics import diagnose_merge

THREADS = min(8, os.cpu_count() or 1)
READ = 2**19
"""Bytes that are read at a time for comparison: fastest, with smaller and larger ones near."""


def read_all(plan: Plan) -> None:
    """Every byte, with the threads of the pass, into memory that is used again."""

    def read(task) -> None:
        store, info, start, count, buffer = task
        store.read_into(info, memoryview(buffer)[:count], start)

    buffers = [bytearray(READ) for _ in range(THREADS)]
    tasks = []
    for tensor in plan.tensors:
        for index, info in tensor.inputs:
            tasks += [(plan.checkpoints[index], info, start, min(READ, info.nbytes - start)) for start in range(0, info.nbytes, READ)]
    with ThreadPoolExecutor(THREADS) as pool:
        shares = [[(*task, buffers[i]) for task in tasks[i::THREADS]] for i in range(THREADS)]
        list(pool.map(lambda share: [read(task) for task in share], shares))


def drop(plan: Plan) -> None:
    """The models' files from the page cache."""
    for file in {file for checkpoint in plan.checkpoints for file in checkpoint.files}:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def seconds(function) -> tuple[float, float]:
    """Wall time, and CPU time of this process and of those that it has waited for."""
    start, before = time.perf_counter(), os.times()
    function()
    return time.perf_counter() - start, sum(os.times()[:4]) - sum(before[:4])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="ties.yml")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each run")
    args = parser.parse_args()
    recipe = args.folder / args.recipe
    command = [sys.executable, "-m", "pymerge", "diagnose", str(recipe)]
    with make_plan(recipe) as plan:
        work = {
            "read": lambda: read_all(plan),
            "pass": lambda: diagnose_merge(plan),
            "command": lambda: subprocess.run(command, check=False, stdout=subprocess.DEVNULL),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
        read_all(plan)
        for _ in range(args.repeat):
            for name, function in work.items():
                if args.cold:
                    drop(plan)
                times[name].append(seconds(function))
        walls, cpus = ({name: min(t[i] for t in found) for name, found in times.items()} for i in (0, 1))
        size = plan.bytes_read / 1e9
        for name, wall in walls.items():
            ratios = f"{wall / walls['read']:5.2f} x reading; CPU {cpus[name]:5.2f} s, {cpus[name] / cpus['read']:5.2f} x"
            print(f"{name:<8} {wall:6.2f} s  {size / wall:5.2f} GB/s  {ratios}  {[round(t, 2) for t, _ in times[name]]}")
    base = torch.randn(1 << 24).mul_(0.02).bfloat16()
    models = [(base + 1e-3 * torch.randn(1 << 24)).bfloat16() for _ in range(3)]
    rows = torch.tensor([[torch.tensor(1e-3).view(torch.int32).item(), -1]] * 3)
    fused = min(seconds(lambda: diagnose(base, models, rows, *new_statistics(3)))[0] for _ in range(5))
    separate = min(seconds(lambda: baselines.diagnosis(base, models))[0] for _ in range(2))
    print(f"3 models of 16.8 M bf16: fused {fused * 1e3:.0f} ms, torch operations {separate * 1e3:.0f} ms, {separate / fused:.1f}x")


if __name__ == "__main__":
    main()
