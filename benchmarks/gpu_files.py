"""Merging checkpoint files on a device, for gpu.py: are the files the CPU's, byte for byte, and how long does it take beside the floor?

The floor is what any merge has to do: read every input, write the output and flush it to the disk. Files lie in the system's folder for
temporary files and have been read before, so reading is from the page cache.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

import pymerge
from pymerge.checkpoint import device as on_device
from pymerge.checkpoint.device import choose_device
from pymerge.checkpoint.merge import run_plan
from pymerge.checkpoint.meter import Meter
from pymerge.checkpoint.plan import make_plan
from pymerge.checkpoint.sizes import parse_bytes
from pymerge.merge_methods.registry import get_method

WEIGHTED = {"weight": 1, "density": 0.2}
SEEDED = {**WEIGHTED, "seed": 7}
CASES = {
    "linear": ("linear", {"weight": 1}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.4}),
    "wise_ft": ("wise_ft", {"alpha": 0.3}),
    "slerp": ("slerp", {"t": 0.4}),
    "ties": ("ties", WEIGHTED),
    "ties whole model": ("ties", {**WEIGHTED, "convention": "paper"}),
    "dare_linear": ("dare_linear", {**SEEDED, "convention": "default"}),
    "dare_ties norm": ("dare_ties", SEEDED),
    "breadcrumbs": ("breadcrumbs", {**WEIGHTED, "gamma": 0.05}),
    "della": ("della", SEEDED),
    "sce": ("sce", {"select_topk": 0.4}),
    "model_stock": ("model_stock", {"filter_wise": True}),
    "karcher": ("karcher", {}),
    "nuslerp": ("nuslerp", {"weight": 1}),
    "ramplus_tl": ("ramplus_tl", {}),
    "magmax": ("magmax", {}),
    "nearswap": ("nearswap", {"t": 0.001}),
}
TIMED = ("linear", "ties")


def merges(device: torch.device, elements: int, rounds: int, left: Callable[[], float]) -> dict:
    """Checks of every case on small files, and times of TIMED on models of `elements`, bf16, three and a base."""
    with tempfile.TemporaryDirectory(prefix="pymerge-bench-") as folder, _usable(device):
        small, large = Path(folder, "small"), Path(folder, "large")
        _write(small, min(elements, 4_000_000), device)
        checks = [_check(small, case, budget) for case in CASES for budget in ("64MiB", None)]
        for row in checks:
            if row["differ"]:
                print(f"  DIFFERS: {row}")
        print(f"{sum(not row['differ'] for row in checks)} of {len(checks)} merges of files give the CPU's bytes", flush=True)
        times = []
        need = 2 * elements * 7
        if shutil.disk_usage(folder).free < 2 * need:
            print(f"no times of files: {folder} has less than {2 * need} bytes free")
        elif not any(row["differ"] for row in checks):
            _write(large, elements, device)
            for case in TIMED:
                if left() > 60:
                    times.append(_time(large, case, min(rounds, 3), device))
                    print(line(times[-1]), flush=True)
    return {"checks": checks, "times": times}


def line(row: dict) -> str:
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in row["stages"].items())
    return (
        f"files, {row['case']:8} {row['seconds']:.2f} s on the device, {row['cpu_seconds']:.2f} s on the CPU, {row['to_floor']:.2f} x "
        f"reading and writing {row['bytes'] / 1e9:.1f} GB ({row['floor_seconds']:.2f} s); busy: {stages}"
    )


@contextmanager
def _usable(device: torch.device) -> Iterator[None]:
    """In a rehearsal the CPU is the device, with everything that a device has but streams of its own."""
    plain = on_device.usable
    if device.type == "cpu":
        on_device.usable = lambda name: device
    try:
        yield
    finally:
        on_device.usable = plain


def _write(folder: Path, elements: int, device: torch.device) -> None:
    """Half of the elements in one tensor, the rest in rows of odd lengths, and a small one in fp32."""
    folder.mkdir()
    half, rest = elements // 2, elements // 4
    shapes = {"embed.weight": (max(half // 128, 1), 128), **{f"layers.{i}.weight": (max(rest // 4 // 77, 1), 77) for i in range(4)}}
    for i, name in enumerate(("base", "m1", "m2", "m3")):
        tensors = {"norm.weight": torch.linspace(0.5, 1.5, 1000) + 0.01 * i, "steps": torch.tensor([3])}
        for j, (key, shape) in enumerate(shapes.items()):
            base, own = (torch.Generator(device=device).manual_seed(seed) for seed in (j, 100 + 10 * i + j))
            values = torch.randn(shape, device=device, generator=base).mul_(0.02)
            if i:
                values += torch.randn(shape, device=device, generator=own).mul_(0.002)
            tensors[key] = values.bfloat16().cpu()
        save_file(tensors, folder / f"{name}.safetensors")


def _recipe(folder: Path, case: str) -> dict:
    method, parameters = CASES[case]
    known = get_method(method)
    models = ["m1", "m2", "m3"][: 2 if method == "nuslerp" else known.max_models]
    recipe = {"merge_method": method, "models": [{"model": str(folder / f"{m}.safetensors")} for m in models], "parameters": parameters}
    return recipe if known.base == "model" else {**recipe, "base_model": str(folder / "base.safetensors")}


def _merge(folder: Path, case: str, out: Path, device: str | None, budget: int | None = None) -> tuple[float, Meter]:
    meter = Meter()
    out.unlink(missing_ok=True)
    os.sync()
    place = choose_device(device, budget, None)
    began = time.perf_counter()
    with make_plan(_recipe(folder, case), out) as plan:
        run_plan(plan, out, device=place, meter=meter)
    return time.perf_counter() - began, meter


def _check(folder: Path, case: str, budget: str | None) -> dict:
    want, got = folder / "cpu.safetensors", folder / "device.safetensors"
    with pymerge.backend("native"):
        _merge(folder, case, want, None)
    _merge(folder, case, got, "cuda", parse_bytes(budget) if budget else None)
    a, b = (torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in (want, got))
    differ = abs(len(a) - len(b)) or int((a != b).sum())
    return {"case": case, "device_memory": budget or "default", "bytes": len(a), "differ": differ}


def _floor(folder: Path, size: int, inputs: list[Path]) -> float:
    buffer, out = bytearray(16 << 20), folder / "floor.bin"
    os.sync()
    began = time.perf_counter()
    for path in inputs:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with open(out, "wb", buffering=0) as file:
        view = memoryview(buffer)
        while size:
            size -= file.write(view[:size])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def _time(folder: Path, case: str, rounds: int, device: torch.device) -> dict:
    out = folder / "out.safetensors"
    used = [Path(each["model"]) for each in _recipe(folder, case)["models"]]
    used += [folder / "base.safetensors"] if "base_model" in _recipe(folder, case) else []
    size = used[0].stat().st_size
    seconds: dict[str, list[float]] = {"floor": [], "cpu": [], "device": []}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(rounds + 1):  # the first one compiles kernels and warms the page cache
        floor = _floor(folder, size, used)
        with pymerge.backend("native"):
            cpu, _ = _merge(folder, case, out, None)
        there, meter = _merge(folder, case, out, "cuda")
        if i:
            for name, value in (("floor", floor), ("cpu", cpu), ("device", there)):
                seconds[name].append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "case": case,
        "bytes": size * (len(used) + 1),
        "seconds": median["device"],
        "cpu_seconds": median["cpu"],
        "floor_seconds": median["floor"],
        "to_floor": median["device"] / median["floor"],
        "stages": {stage: meter.seconds[stage] for stage in meter.stages},
        "device_budget_bytes": choose_device("cuda", None, None).memory,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
