"""The accuracy that csrc/kernels/exp-inl.h states."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_errors_are_as_stated(tmp_path):
    program = tmp_path / "exp_accuracy"
    source = Path(__file__).with_name("exp_accuracy.cpp")
    subprocess.run([COMPILER, "-std=c++17", "-O2", "-ffp-contract=off", "-I", ROOT / "csrc", source, "-o", program], check=True)
    measured = [float(x) for x in subprocess.run([program, "401"], capture_output=True, text=True, check=True).stdout.split()]
    header = (ROOT / "csrc/kernels/exp-inl.h").read_text()
    stated = [float(x) for x in re.search(r"Exp ([\d.]+) ulp, ExpM1 ([\d.]+) ulp, Log1p ([\d.]+) ulp", header).groups()]
    assert all(m <= s for m, s in zip(measured, stated)), measured
