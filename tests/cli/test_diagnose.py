"""`pymerge diagnose`: verdicts in words, JSON, a picture, and exit statuses."""

import json

import pytest
import torch

from tests.checkpoint.files import save_model, tensors_of

from .test_commands import run

TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, density: 0.3}\n"


@pytest.fixture
def models(tmp_path):
    base = tensors_of(0, width=64)

    def tuned(seed, size):
        g = torch.Generator().manual_seed(seed)
        return {k: v + size * torch.randn(v.shape, generator=g) for k, v in base.items()}

    for name, tensors in (("base", base), ("a", tuned(1, 0.01)), ("b", tuned(2, 0.01)), ("loud", tuned(3, 0.1))):
        save_model(tmp_path / name, tensors)
    save_model(tmp_path / "stranger", tensors_of(9, width=64))
    (tmp_path / "r.yml").write_text(TIES)
    return tmp_path


def test_fine(models):
    done = run("diagnose", "r.yml", cwd=models)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fine: ") and "[fine] shared base" in done.stdout and "not a forecast" in done.stdout
    found = json.loads(run("diagnose", "r.yml", "--json", "--trim", "1", "--threads", "1", cwd=models).stdout)
    assert found["outcome"] == "fine" and found["interference"]["models"] == ["a", "b"] and len(found["kinships"]) == 2


def test_doubtful_and_bad(models):
    (models / "r.yml").write_text(TIES.replace("model: b}", "model: loud}"))
    done = run("diagnose", "r.yml", cwd=models)
    assert done.returncode == 3 and "[doubtful] balance: loud is 10" in done.stdout
    (models / "r.yml").write_text(TIES.replace("model: b}", "model: stranger}"))
    done = run("diagnose", "r.yml", cwd=models)
    assert done.returncode == 4 and "[bad] shared base: FAIL: stranger and base do not share a base" in done.stdout
    (models / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: stranger}]\nparameters: {weight: 1}\n")
    assert run("diagnose", "r.yml", cwd=models).returncode == 4


def test_refused(models):
    (models / "r.yml").write_text(TIES.replace("model: b}", "model: missing}"))
    done = run("diagnose", "r.yml", cwd=models)
    assert done.returncode == 2 and "'missing' does not exist" in done.stderr
    (models / "r.yml").write_text("merge_method: passthrough\nmodels: [{model: a}]\n")
    done = run("diagnose", "r.yml", cwd=models)
    assert done.returncode == 2 and "nothing to compare" in done.stderr


def test_nan_and_picture(models):
    pytest.importorskip("matplotlib")
    assert run("diagnose", "r.yml", "--plot", "p.png", cwd=models).returncode == 0
    assert (models / "p.png").read_bytes()[:4] == b"\x89PNG"
    tensors = tensors_of(0, width=64)
    tensors["lm_head.weight"][3, 4] = float("nan")
    save_model(models / "b", tensors)
    done = run("diagnose", "r.yml", cwd=models)
    assert done.returncode == 1 and "b: 'lm_head.weight' has a NaN" in done.stderr and "Traceback" not in done.stderr
