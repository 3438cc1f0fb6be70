"""Machine code of the kernels for GPUs that are not there; `make aot` checks all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def compiled(*arguments) -> str:
    done = subprocess.run([sys.executable, "benchmarks/aot.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kernel", ["ties", "dare_linear"])
def test_machine_code_for_hopper(kernel):
    assert compiled("--kernel", kernel, "--dtype", "bf16", "--target", "sm_90").endswith("1 compiled, 0 broken\n")


def test_ties_compile_in_fp64():
    """Compiled code has types where the interpreter has none."""
    assert compiled("--kernel", "cut", "--dtype", "fp64", "--target", "sm_90").endswith("1 compiled, 0 broken\n")


def test_machine_code_for_every_architecture():
    assert compiled("--kernel", "merge", "--dtype", "bf16").endswith("4 compiled, 0 broken\n")


@pytest.mark.slow
def test_all_machine_code():
    assert ", 0 broken" in compiled()
