"""What a speed has to be told with: the machine and the versions. Run as a script it prints the name of today's result file."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

# The instruction sets that change how fast a merge can be.
FLAGS = ("avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*:\s*(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1).strip() if found else ""


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _last_level_cache() -> str:
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text().strip() if sizes else "unknown"


def _compiler() -> str:
    try:
        return subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def describe() -> dict:
    flags = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": cpu_name(),
        "family_model": f"{_cpuinfo('cpu family')}/{_cpuinfo('model')}",
        "cores": cores,
        "flags": [flag for flag in FLAGS if flag in flags],
        "last_level_cache": _last_level_cache(),
        "memory_gib": round(memory / 2**30, 1),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "compiler": _compiler(),
    }


def result_name() -> str:
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return f"{datetime.date.today():%Y-%m-%d}-{cpu}"


if __name__ == "__main__":
    print(result_name())
