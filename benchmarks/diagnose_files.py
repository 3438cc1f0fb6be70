"""Time `pymerge diagnose` on files beside reading them with the same reader, and the fused reduction beside separate torch operations.

    python benchmarks/make_checkpoints.py /tmp/bench
    python benchmarks/diagnose_files.py /tmp/bench

Files are warm in the page cache; the reads, the pass and the whole command (a process of its own) are timed in turn, the fastest of each.
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
from pymerge.diagnose_ops import PIECE, diagnose, new_statistics
from pymerge.diagnostics import diagnose_merge

THREADS = min(8, os.cpu_count() or 1)


def read_all(plan: Plan) -> None:
    """Every byte, in the pieces and with the threads of the pass, into memory that is used again."""

    def read(task) -> None:
        store, info, start, count, buffer = task
        store.read_into(info, memoryview(buffer)[:count], start)

    buffers = [bytearray(PIECE * 8) for _ in range(THREADS)]
    tasks = []
    for tensor in plan.tensors:
        for start in range(0, tensor.inputs[0][1].nbytes, 2 * PIECE):
            for index, info in tensor.inputs:
                tasks.append((plan.checkpoints[index], info, start, min(2 * PIECE, info.nbytes - start), None))
    with ThreadPoolExecutor(THREADS) as pool:
        shares = [[(*task[:4], buffers[i]) for task in tasks[i::THREADS]] for i in range(THREADS)]
        list(pool.map(lambda share: [read(task) for task in share], shares))


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="ties.yml")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    recipe = args.folder / args.recipe
    command = [sys.executable, "-m", "pymerge", "diagnose", str(recipe)]
    with make_plan(recipe) as plan:
        read_all(plan)
        times: dict[str, list[float]] = {"read": [], "pass": [], "command": []}
        for _ in range(args.repeat):
            times["read"].append(seconds(lambda: read_all(plan)))
            times["pass"].append(seconds(lambda: diagnose_merge(plan)))
            times["command"].append(seconds(lambda: subprocess.run(command, check=False, stdout=subprocess.DEVNULL)))
        floor, size = min(times["read"]), plan.bytes_read / 1e9
        for name, all_times in times.items():
            best = min(all_times)
            print(f"{name:<8} {best:6.2f} s  {size / best:5.2f} GB/s  {best / floor:5.2f} x reading  {[round(t, 2) for t in all_times]}")
    base = torch.randn(1 << 24).mul_(0.02).bfloat16()
    models = [(base + 1e-3 * torch.randn(1 << 24)).bfloat16() for _ in range(3)]
    rows = torch.tensor([[torch.tensor(1e-3).view(torch.int32).item(), -1]] * 3)
    fused = min(seconds(lambda: diagnose(base, models, rows, *new_statistics(3))) for _ in range(5))
    separate = min(seconds(lambda: baselines.diagnosis(base, models)) for _ in range(2))
    print(f"3 models of 16.8 M bf16: fused {fused * 1e3:.0f} ms, torch operations {separate * 1e3:.0f} ms, {separate / fused:.1f}x")


if __name__ == "__main__":
    main()
