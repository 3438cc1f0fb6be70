"""Merges onto disks that are too small: filesystems of a few megabytes, and files that must not grow."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.test_commands import ROOT, environment, run

from .adapters import save_adapter
from .files import save_model, tree

MODEL = "merge_method: linear\nmodels: [{model: inputs/a}, {model: inputs/b}]\nparameters: {weight: 0.5}\n"
ADAPTER = "merge_method: cat\nmodels: [{model: inputs/x}, {model: inputs/y}]\n"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Models and adapters whose merge takes 6 MB."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        g = torch.Generator().manual_seed(seed)
        save_model(tmp_path / "inputs" / name, {f"w{i}": torch.randn(750_000, generator=g).half() for i in range(4)})
    for seed, name in enumerate("xy"):
        g = torch.Generator().manual_seed(seed)
        pairs = {f"m{i}": (torch.randn(4, 50_000, generator=g), torch.randn(3, 4, generator=g)) for i in range(4)}
        save_adapter(tmp_path / "inputs" / name, pairs)
    Path("model.yml").write_text(MODEL)
    Path("adapter.yml").write_text(ADAPTER)
    return tmp_path


def test_a_disk_that_is_full(work):
    namespace = ["unshare", "--map-root-user", "--mount"]
    probe = [*namespace, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(work / "inputs")]
    if shutil.which("unshare") is None or (tried := subprocess.run(probe, capture_output=True, text=True)).returncode:
        reason = "there is no unshare" if shutil.which("unshare") is None else tried.stderr.strip()
        pytest.skip(f"a small filesystem cannot be mounted here: {reason}")
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "tests.checkpoint.full_disk", str(work)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind, result in json.loads(done.stdout).items():
        before, during, still, after = (result[when] for when in ("before", "during", "still", "after"))
        assert before["status"] != 0 and before["there"] == [], "it is known before anything is written"
        assert "out: needs 6" in before["err"] and "MB free; make room, or write to another disk" in before["err"]
        assert "3.15 MB free" in before["err"] and before["err"].count("make room") == 1

        assert during["status"] == 1 and "No space left on device; make room, or write to another disk" in during["err"]
        assert "small/out.partial/output/" in during["err"] and "were still to be written, and " in during["err"]
        assert "Traceback" not in during["err"] and "out" not in during["there"]
        assert result["inputs"]
        if kind == "model":
            assert "out.partial keeps the " in during["err"] and " of 4 tensors that are done" in during["err"]
            assert "out.partial/output/model.safetensors" in during["there"]
            assert still["status"] == 2 and "out.partial" in still["there"], "no room yet: what is done stays"
            assert "tensors were done before" in after["out"] or "tensor were done before" in after["out"]
        else:
            assert during["there"] == [], "an adapter is made in one go"
        assert after["status"] == 0 and "out.partial" not in after["there"]
        assert result["same"], "as a merge that nothing interrupted"


def test_an_adapter_of_files_that_must_not_grow(work):
    """As on a filesystem that takes files of some size only; of models see tests/cli/test_processes.py."""
    before = tree(work)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        done = run("merge", "adapter.yml", "out", cwd=work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "out.partial/output/adapter_model.safetensors: File too large; that file system does not take files of this size" in done.stderr
    assert tree(work) == before, "nothing was done, so nothing is kept"
