"""The demo runs from training to picture, by the installed command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_digits_demo(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    if not Path(sys.executable).with_name("pymerge").exists():
        pytest.skip("pymerge is not installed")
    for _ in range(2):  # the second time over its own output
        done = subprocess.run([sys.executable, ROOT / "examples/digits_demo.py", tmp_path], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "base/model.safetensors.index.json").exists()
    for row in ("expert rotated", "soup", "task arithmetic, 0.4", "TIES, 20 %", "DARE-TIES, 50 %", "WiSE-FT noised, 0.5"):
        assert f"│ {row} " in done.stdout
    assert "Forgetting: upright goes from" in done.stdout
