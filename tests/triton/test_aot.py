"""Machine code of the kernels for GPUs that are not there; `make aot` checks all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kernel", ["merge", "ties", "dare_linear", "lerp", "bracket"])
def test_machine_code(kernel):
    command = [sys.executable, "benchmarks/aot.py", "--kernel", kernel, "--dtype", "bf16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("4 compiled, 0 broken\n")
