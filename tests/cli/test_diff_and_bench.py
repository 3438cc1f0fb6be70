"""`pymerge diff`, `bench`, `completion`: what people see."""

import json
import os
import subprocess
import sys

import pytest
import torch

from pymerge.speed import methods as speed_methods
from tests.checkpoint.files import save_model, tensors_of, tree

from .test_commands import environment, run


@pytest.fixture
def models(tmp_path):
    a = tensors_of(0, layers=11)
    b = {name: x.clone() for name, x in a.items()}
    b["model.layers.10.mlp.up_proj.weight"] += 0.01
    b["model.layers.2.self_attn.q_proj.weight"] += 0.1
    b["extra.weight"] = torch.ones(3)
    save_model(tmp_path / "a", a, 2)
    save_model(tmp_path / "b", b)
    return tmp_path


def test_diff(models):
    done = run("diff", "a", "b", cwd=models)
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layer", "tensors", "size", "drift", "max", "|a-b|", "cosine", "changed"]
    assert [line.split()[0] for line in lines[1:5]] == ["lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1"]
    layer = next(line.split() for line in lines if line.startswith("model.layers.10"))
    assert layer[1:4] == ["3", "3.14", "kB"] and layer[5] == "0.01" and layer[-2:] == ["65.3", "%"]
    assert "36 tensors compared: 2 differ, 34 are equal" in lines
    assert lines[-2:] == ["1 tensor only in B:", "  extra.weight  F32 [3]"]

    top = run("diff", "a", "b", "--by", "tensor", "--sort", "max", "--top", "2", cwd=models).stdout.splitlines()
    assert [line.split()[0] for line in top[1:4]] == [
        "model.layers.2.self_attn.q_proj.weight", "model.layers.10.mlp.up_proj.weight", "all",
    ]  # fmt: skip
    kinds = json.loads(run("diff", "a", "b", "--by", "kind", "--sort", "drift", "--json", cwd=models).stdout)
    assert kinds["rows"][0]["name"] == "model.layers.*.self_attn.q_proj.weight" and kinds["rows"][0]["tensors"] == 11


def test_diff_ends_as_diff_does(models):
    same = run("diff", "a", "a", cwd=models)
    assert (same.returncode, same.stdout) == (0, "equal: 36 tensors, 39.7 kB, bit for bit\n")
    assert [run("diff", "-q", "a", "b", cwd=models).stdout, run("diff", "-q", "a", "b", cwd=models).returncode] == ["", 1]
    missing = run("diff", "a", "c", cwd=models)
    assert missing.returncode == 2 and missing.stderr.startswith("error: c: does not exist; name a ")


def test_diff_draws(models):
    pytest.importorskip("matplotlib")
    assert run("diff", "a", "b", "--plot", "d.svg", cwd=models).returncode == 1
    assert "relative drift" in (models / "d.svg").read_text()
    wrong = run("diff", "a", "b", "--plot", "d.xyz", cwd=models)
    assert wrong.returncode == 2 and "has to end in .png, .svg or .pdf" in wrong.stderr


def test_bench(tmp_path):
    before = tree(tmp_path)
    done = run(
        "bench", "linear", "slerp", "--size", "10k", "--seconds", "0.01", "--disk", ".", "--disk-size", "1MB", "--json", cwd=tmp_path
    )
    content = json.loads(done.stdout)
    assert done.returncode == 0 and tree(tmp_path) == before, "the file on the disk is gone"
    linear, slerp = content["methods"]
    assert (linear["method"], linear["models"], linear["base"], linear["bytes"]) == ("linear", 3, False, 4 * 2 * 10240)
    assert (slerp["models"], slerp["base"], slerp["bytes"]) == (1, True, 3 * 2 * 10240)
    assert all(m["seconds"] > 0 and m["copy_seconds"] > 0 and m["rounds"] >= 3 for m in content["methods"])
    assert all(rate > 0 for rate in content["memory"].values()) and content["disk"]["write_bytes_per_second"] > 0
    assert content["disk"]["bytes"] == 10**6

    table = run("bench", "wise_ft", "--size", "10k", "--size", "20000", "--seconds", "0.01", "--dtype", "float32", cwd=tmp_path).stdout
    rows = [line.split() for line in table.splitlines() if line.startswith("wise_ft")]
    assert [row[4] for row in rows] == ["10k", "20000"] and "float32" in rows[0]


def test_bench_tells_no_speed_of_a_wrong_result(tmp_path, monkeypatch):
    from pymerge import ops

    original = ops.merge

    def wrong(base, models, spec, *, out, **kwargs):
        original(base, models, spec, out=out, **kwargs)
        if ops.forced_backend() != "reference":
            out[123] += 1
        return out

    monkeypatch.setattr(ops, "merge", wrong)
    done = run("bench", "ties", "--size", "10k", "--seconds", "0.01", cwd=tmp_path)
    assert done.returncode == 1 and "ties: 1 of 10240 elements are not the reference's, the first at 123: " in done.stderr
    assert "GB/s" not in "".join(line for line in done.stdout.splitlines() if line.startswith("ties"))


def test_bench_covers_every_method():
    import pymerge
    from pymerge.merge_methods.registry import get_method

    for name in pymerge.methods():
        if get_method(name).tensor.__module__.startswith("pymerge."):
            assert isinstance(speed_methods._parameters(get_method(name), 2), dict)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(tmp_path, shell):
    done = run("completion", shell, cwd=tmp_path)
    assert done.returncode == 0 and "_PYMERGE_COMPLETE" in done.stdout


def test_completion():
    """What the script asks the program for: commands, and the options of one, without loading torch."""
    from pathlib import Path

    program = [str(Path(sys.executable).with_name("pymerge"))]
    if not os.path.exists(program[0]):
        pytest.skip("the command is not installed")
    for words, expected in (("pymerge i", "plain,inspect"), ("pymerge diff --pl", "plain,--plot")):
        env = {**environment(), "_PYMERGE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines() == [expected], done.stderr
