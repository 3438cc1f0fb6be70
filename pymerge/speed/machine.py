"""What a speed has to be told with: the machine and the versions.

`python -m pymerge.speed.machine` prints the name of today's result file, see benchmarks/.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from .._version import __version__

__all__ = ["cpu_name", "describe", "result_name", "vendor"]

# The instruction sets that change how fast a merge can be.
FLAGS = ("avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*:\s*(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1).strip() if found else ""


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def vendor() -> str:
    """Who made the CPU, as it says: AuthenticAMD, GenuineIntel; an arm64 core's implementer, "0x41"."""
    return _cpuinfo("vendor_id") or _cpuinfo("CPU implementer") or "unknown"


def _last_level_cache() -> str:
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text().strip() if sizes else "unknown"


def _compiler() -> str:
    try:
        return subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def _native() -> tuple[str, list[str]]:
    """The instruction set that the C++ core uses, and those that it could; why it does not load, and none."""
    try:
        from .. import native
    except ImportError as error:
        return str(error), []
    return native.current_isa(), list(native.available_isas())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict:
    """The machine, the versions and the backends, without the host's name; for JSON."""
    flags = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    isa, isas = _native()
    return {
        "pymerge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "os": f"{platform.system()} {platform.machine()}",
        "isa": isa,
        "isas": isas,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": cpu_name(),
        "family_model": f"{_cpuinfo('cpu family') or _cpuinfo('CPU variant')}/{_cpuinfo('model') or _cpuinfo('CPU part')}",
        "cores": cores,
        "flags": [flag for flag in FLAGS if flag in flags],
        "last_level_cache": _last_level_cache(),
        "memory_gib": round(memory / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "compiler": _compiler(),
    }


def result_name() -> str:
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return f"{datetime.date.today():%Y-%m-%d}-{cpu}"


if __name__ == "__main__":
    print(result_name())
