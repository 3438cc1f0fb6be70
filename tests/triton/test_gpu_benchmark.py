"""`make gpu` without a GPU: its rehearsal runs to the end, so that a machine with a GPU is not needed to find its mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("interpret", ["0", "1"], ids=["native", "interpreter"])
def test_rehearsal(interpret, tmp_path):
    if interpret == "1":
        pytest.importorskip("triton")
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--elements", "2000", "--rounds", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["checks"] and not any(row["differ"] for row in result["checks"])
    assert {row["method"] for row in result["speeds"]} >= {"soup", "ties", "dare_linear", "ema"}
    assert result["many_tensors"]["ratio"] > 0 and result["kl_forward"]["ms"] > 0
    assert result["files"]["checks"] and not any(row["differ"] for row in result["files"]["checks"])
    assert {row["case"] for row in result["files"]["times"]} == {"linear", "ties"}
    if interpret == "1":
        launched = result["many_tensors"]["launches"]
        assert launched["one"] > 0 and launched["thousand"] <= 2 * launched["one"]
