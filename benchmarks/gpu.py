"""Everything about the GPU in one command: are the results the CPU's, byte for byte, and how fast are they made?

    python benchmarks/gpu.py            # with a Python that has torch for the GPU, and triton; files need safetensors and PyYAML

Prints a table and writes benchmarks/results/DATE-GPU.json, and a roofline plot beside it where matplotlib is installed. Takes less than
eight minutes. `--device cpu --elements 1e6` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_rivals  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pymerge  # noqa: E402
import pymerge.kl_ops  # noqa: E402, F401  (registers the divergence's operators)

BUDGET_S = 450
KERNELS = os.environ.get("TRITON_INTERPRET") == "1"  # a rehearsal with the kernels in Triton's interpreter
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STARTED = time.perf_counter()


def left() -> float:
    return BUDGET_S - (time.perf_counter() - STARTED)


def build_core() -> None:
    """The C++ core is the other side of the comparison; build it only if it is not there."""
    try:
        from pymerge import native  # noqa: F401
    except ImportError:
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)


def describe(device: torch.device) -> dict:
    result = {"python": sys.version.split()[0], "torch": torch.__version__, "date": datetime.date.today().isoformat(), "name": "cpu"}
    try:
        import triton

        result["triton"] = triton.__version__
    except ImportError:
        result["triton"] = None
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        result |= {
            "name": p.name,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
            "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
            "capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
        }
    return result


class Clock:
    """Milliseconds on a device: CUDA events, or the wall clock for a rehearsal."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def once(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def interleaved(self, runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Each in turn, after two rounds that are not counted (compilation, caches)."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(rounds + 2):
            for name, run in runs.items():
                elapsed = self.once(run)
                if i >= 2:
                    times[name].append(elapsed)
        return times


# --------------------------------------------------------------------------------------------------------------------------------------
# What is merged

METHODS: dict[str, Callable[[Tensor, list[Tensor], Tensor], object]] = {
    "soup": lambda base, models, out: pymerge.linear(models, out=out),
    "task_arithmetic": lambda base, models, out: pymerge.task_arithmetic(base, models, [0.4] * len(models), out=out),
    "wise_ft": lambda base, models, out: pymerge.wise_ft(base, models[0], alpha=0.3, out=out),
    "dare_linear": lambda base, models, out: pymerge.dare_linear(base, models, density=0.5, seed=7, out=out),
    "dare_ties": lambda base, models, out: pymerge.dare_ties(base, models, density=0.5, seed=7, out=out),
    "ties": lambda base, models, out: pymerge.ties(base, models, density=0.2, out=out),
    "ema": lambda base, models, out: pymerge.ema_update(out, models[0], decay=0.999, check_finite=False),
}

# Checked, and timed under the plain methods' names only.
_MAJORITY = pymerge.Convention(zero_vote="majority", vote="count")
VARIANTS: dict[str, Callable[[Tensor, list[Tensor], Tensor], object]] = {
    "breadcrumbs": lambda base, models, out: pymerge.breadcrumbs(base, models, out=out),
    "breadcrumbs_ties": lambda base, models, out: pymerge.breadcrumbs_ties(base, models, density=0.5, gamma=0.05, out=out),
    "dare_linear norm": lambda base, models, out: pymerge.dare_linear(base, models, density=0.5, seed=7, convention="mergekit", out=out),
    "dare_ties norm": lambda base, models, out: pymerge.dare_ties(base, models, density=0.5, seed=7, convention="mergekit", out=out),
    "ties majority": lambda base, models, out: pymerge.ties(base, models, density=0.2, convention=_MAJORITY, out=out),
    "ties paper": lambda base, models, out: pymerge.ties(base, models, density=0.2, convention="paper", out=out),
    "ties whole model": lambda base, models, out: pymerge.ties(
        _halves(base), [_halves(x) for x in models], density=0.2, convention="paper", out=_halves(out)
    ),
}


def _halves(t: Tensor) -> dict[str, Tensor]:
    """Two tensors of one model, the second one at an odd address: views, so that writing them writes `t`."""
    middle = t.numel() // 2 | 1
    return {"first": t[:middle], "second": t[middle:]}


def kernels_of(device: torch.device):
    """Insists on the kernels where they can run, so that no fallback is measured."""
    return pymerge.backend("triton" if device.type == "cuda" or KERNELS else "native")


def weights(n: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator(device=device).manual_seed(0)
    base = torch.randn(n, device=device, generator=generator).mul_(0.02)
    models = [torch.randn(n, device=device, generator=generator).mul_(0.002).add_(base).to(dtype) for _ in range(count)]
    return base.to(dtype), models


def bytes_moved(method: str, base: Tensor, models: list[Tensor], out: Tensor) -> int:
    """Every input read once, the output written once."""
    if method == "soup":
        return sum(x.nbytes for x in models) + out.nbytes
    if method == "wise_ft":
        return base.nbytes + models[0].nbytes + out.nbytes
    if method == "ema":
        return models[0].nbytes + 2 * out.nbytes
    return base.nbytes + sum(x.nbytes for x in models) + out.nbytes


# --------------------------------------------------------------------------------------------------------------------------------------
# The same bytes


def same_bytes(device: torch.device, largest: int) -> list[dict]:
    """GPU against the C++ core for every method and dtype, and against the reference where that is quick."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for n in (size for size in (0, 1, 1023, 70_001, 3_000_017) if size <= max(largest, 1023)):
            base, models = weights(n, 3, dtype, torch.device("cpu"))
            for method, run in {**METHODS, **VARIANTS}.items():
                outs = []
                for where, backend in [(device, None), (torch.device("cpu"), "native"), (torch.device("cpu"), "reference")]:
                    if backend == "reference" and n > 100_000:
                        continue
                    out = base.clone() if method == "ema" else torch.full_like(base, float("nan"))
                    args = [base.to(where), [x.to(where) for x in models], out.to(where)]
                    with kernels_of(device) if backend is None else pymerge.backend(backend):
                        run(*args)
                    outs.append(args[2].cpu())
                integer = torch.int16 if dtype.itemsize == 2 else torch.int32
                differ = [int((outs[0].view(integer) != other.view(integer)).sum()) for other in outs[1:]]
                rows.append({"method": method, "dtype": dtype_name, "elements": n, "differ": max(differ)})
    return rows


# --------------------------------------------------------------------------------------------------------------------------------------
# Speed


def speeds(device: torch.device, n: int, rounds: int) -> list[dict]:
    rows = []
    for method in METHODS:
        for dtype_name, count in (("bf16", 4), ("fp32", 3)):
            if left() < 90:
                print(f"out of time before {method} {dtype_name}")
                return rows
            rows.append({"method": method, "dtype": dtype_name, "models": count, "elements": n})
            rows[-1] |= speed(method, *weights(n, count, DTYPES[dtype_name], device), Clock(device), rounds)
            print(line(rows[-1]), flush=True)
    return rows


def speed(method: str, base: Tensor, models: list[Tensor], clock: Clock, rounds: int) -> dict:
    out = torch.zeros_like(base, dtype=torch.float32 if method == "ema" else base.dtype)

    def ours() -> None:
        with kernels_of(base.device):
            METHODS[method](base, models, out)

    moved = bytes_moved(method, base, models, out)
    extra = None
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours()
        extra = torch.cuda.max_memory_allocated() - before
    source, target = torch.ones(2, moved // 2, dtype=torch.uint8, device=base.device)
    times = clock.interleaved({"ours": ours, "copy": lambda: target.copy_(source)}, rounds)
    ms, copy = statistics.median(times["ours"]), statistics.median(times["copy"])
    return {
        "ms": ms,
        "gb_per_s": moved / ms / 1e6,
        "copy_ms": copy,
        "copy_gb_per_s": moved / copy / 1e6,
        "to_copy": ms / copy,
        "spread": (max(times["ours"]) - min(times["ours"])) / ms,
        "extra_bytes": extra,
        **gpu_rivals.times(method, base, models, clock, min(rounds, 3)),
    }


def many_tensors(device: torch.device, total: int, rounds: int) -> dict:
    """A state dict of a thousand tensors against one tensor of the same size: launches must not grow with the number of tensors."""
    clock = Clock(device)
    base, models = weights(total, 3, torch.bfloat16, device)
    count = min(1000, max(total // 100, 1))  # fewer in a small rehearsal
    size = total // count
    split = [{f"w{i}": x[i * size : (i + 1) * size].clone() for i in range(count)} for x in (base, *models)]
    whole = torch.zeros_like(base)
    pieces = {name: torch.zeros_like(t) for name, t in split[0].items()}
    runs = {
        "one": lambda: pymerge.ties(base, models, density=0.2, out=whole),
        "thousand": lambda: pymerge.ties(split[0], split[1:], density=0.2, out=pieces),
    }
    with kernels_of(device):
        launched = {name: launches(run) for name, run in runs.items()}
        times = clock.interleaved(runs, rounds)
    one, thousand = (statistics.median(times[name]) for name in runs)
    return {"elements": total, "one_ms": one, "thousand_ms": thousand, "ratio": thousand / one, "launches": launched, "tensors": count}


def launches(run: Callable[[], object]) -> int | None:
    """How many of Triton's kernels `run` launches; None where none of them is used."""
    try:
        from pymerge.triton_kernels.combine import combine_kernel
    except ImportError:
        return None
    kind, count = type(combine_kernel), 0
    plain = kind.__getitem__

    def counted(kernel, grid):
        nonlocal count
        count += 1
        return plain(kernel, grid)

    kind.__getitem__ = counted
    try:
        run()
    finally:
        kind.__getitem__ = plain
    return count or None


def divergence(device: torch.device, elements: int, rounds: int) -> dict:
    """Forward KL at a vocabulary of 128k, bf16, beside one read of both models' logits and torch."""
    vocab = min(128 * 1024, elements)
    rows = max(min(2**30, 2 * elements) // (2 * vocab), 1)
    generator = torch.Generator(device=device).manual_seed(0)
    student = torch.randn(rows, vocab, device=device, generator=generator, dtype=torch.bfloat16)
    teacher = student + torch.randn(rows, vocab, device=device, generator=generator, dtype=torch.bfloat16)
    words = [x.view(torch.int16).view(-1) for x in (student, teacher)]
    sample = slice(0, 4)
    with kernels_of(device):
        got = torch.ops.pymerge.kl_divergence(student[sample], teacher[sample], "forward").double()
    log_q, log_p = (x[sample].double().log_softmax(-1) for x in (student, teacher))
    want = (log_p.exp() * (log_p - log_q)).sum(-1)
    if not torch.allclose(got, want, rtol=1e-4, atol=1e-6):
        raise SystemExit(f"KL is wrong, so its time means nothing: {got.tolist()}, not {want.tolist()}")

    def ours() -> None:
        with kernels_of(device):
            torch.ops.pymerge.kl_divergence_forward(student, teacher, "forward")

    runs = {"ours": ours, "read": lambda: [x.amax() for x in words]}
    times = {name: statistics.median(t) for name, t in Clock(device).interleaved(runs, rounds).items()}
    moved = student.nbytes + teacher.nbytes
    return {
        "rows": rows, "vocab": vocab, "ms": times["ours"], "read_ms": times["read"], "to_read": times["ours"] / times["read"],
        "gb_per_s": moved / times["ours"] / 1e6,
    }  # fmt: skip


def files(device: torch.device, elements: int, rounds: int) -> dict:
    """Checkpoint files merged with `--device`, beside the CPU and beside reading and writing them."""
    try:
        import gpu_files
    except ImportError as error:
        print(f"no files were merged: {error}")
        return {"checks": [], "times": [], "skipped": str(error)}
    with kernels_of(device):
        return gpu_files.merges(device, elements, rounds, left)


def line(row: dict) -> str:
    rivals = "  ".join(f"{name} {row[name] / row['ms']:.1f}x" for name in ("naive_ms", "best_torch_ms") if row.get(name))
    return (
        f"{row['method']:16} {row['dtype']} x{row['models']} {row['elements'] / 2**20:6.0f}M {row['ms']:8.3f} ms "
        f"{row['gb_per_s']:7.0f} GB/s  {row['to_copy']:.2f} x copy ({row['copy_gb_per_s']:.0f} GB/s)  {rivals}"
    )


def plot(result: dict, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["speeds"]
    labels = [f"{r['method']} {r['dtype']}" for r in rows]
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1.5))
    axes.barh(labels, [r["gb_per_s"] for r in rows], label="pymerge")
    axes.plot([r["copy_gb_per_s"] for r in rows], labels, "k|", markersize=14, label="device copy of the same bytes")
    axes.set_xlabel("GB/s of compulsory traffic")
    axes.set_title(result["machine"]["name"])
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=float, default=256 * 2**20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False with this Python; nothing was measured", file=sys.stderr)
        return 2
    build_core()
    machine = describe(device)
    print(json.dumps(machine))
    checks = same_bytes(device, int(args.elements))
    wrong = [row for row in checks if row["differ"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} results are the CPU's bytes")
    for row in wrong:
        print(f"  DIFFERS: {row}")
    broken = {row["method"] for row in wrong}
    for method in broken:  # a wrong result has no speed
        METHODS.pop(method, None)
    result = {"machine": machine, "checks": checks, "speeds": speeds(device, int(args.elements), args.rounds)}
    if left() > 60 and "ties" not in broken:
        result["many_tensors"] = many_tensors(device, min(int(args.elements), 64 * 2**20), args.rounds)
        print("{tensors} tensors: {ratio:.2f} x one tensor of the same size, launches {launches}".format(**result["many_tensors"]))
    if left() > 40:
        result["kl_forward"] = divergence(device, int(args.elements), args.rounds)
        print("KL, {rows} rows of {vocab}: {ms:.3f} ms, {to_read:.2f} x one read of the logits".format(**result["kl_forward"]))
    if left() > 100:
        result["files"] = files(device, int(args.elements), args.rounds)
        wrong += [row for row in result["files"]["checks"] if row["differ"]]
    result["seconds"] = time.perf_counter() - STARTED
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"{machine['date']}-{re.sub(r'[^a-z0-9]+', '-', machine['name'].lower()).strip('-')}"
    path = args.out / f"{stem}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, path.with_suffix(".png"))
    print(f"{path}: {result['seconds']:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
