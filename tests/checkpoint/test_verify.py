"""`pymerge.verify` and `pymerge verify`: what they find, and what they say when they cannot look."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint.format import CheckpointError
from pymerge.recipe import RecipeError
from tests.cli.test_commands import run

from .files import save_model, tensors_of, tree

RECIPE = {
    "merge_method": "dare_ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 1, "density": 0.5},
}  # fmt: skip


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        save_model(tmp_path / name, tensors_of(i), 1 + i % 2)
    pymerge.merge(RECIPE, "out", shard_size=4000, seed=7, out_dtype="bfloat16", verify=True)
    return tmp_path / "out"


def change(out, name, element):
    """One element of one tensor, in place."""
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            tensors[name].view(-1)[element] += 1
            save_file(tensors, path, metadata=metadata)


def test_what_was_merged_is_right(out):
    before = tree(out.parent)
    report = pymerge.verify(out, sample=None)
    assert report.ok and len(report.checked) == report.tensors == 12 and report.version == pymerge.__version__
    assert tree(out.parent) == before
    chosen = [pymerge.verify(out, sample=3, seed=s).checked for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and all(len(c) == 3 for c in chosen)


def test_a_changed_element_is_found(out):
    change(out, "model.layers.1.mlp.up_proj.weight", 77)
    report = pymerge.verify(out, sample=None)
    assert report.differences == (("model.layers.1.mlp.up_proj.weight", "differs from byte 154 (element 77) on"),)
    assert not report.ok


def test_other_tensors(out):
    for path in out.glob("*.safetensors"):
        path.unlink()
    (out / "model.safetensors.index.json").unlink()
    tensors = {name: t.bfloat16() for name, t in tensors_of(0).items()}
    tensors["extra"] = torch.ones(2)
    del tensors["lm_head.weight"]
    tensors["model.norm.weight"] = torch.ones(16)
    save_model(out, tensors)
    differences = dict(pymerge.verify(out, sample=1).differences)
    assert differences["lm_head.weight"] == "is missing"
    assert differences["extra"] == "is not in the recipe's result"
    assert differences["model.norm.weight"] == "is F32 [16], the recipe gives BF16 [16]"


def test_changed_inputs(out):
    path = out.parent / "b/model.safetensors"
    tensors = tensors_of(2)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    sampled, whole = pymerge.verify(out), pymerge.verify(out, sample=None)
    assert sampled.inputs == () and [name for name, _ in sampled.differences] == ["model.norm.weight"]
    assert len(whole.inputs) == 1 and whole.inputs[0].startswith("b/model.safetensors: its SHA-256 is ")
    save_file(tensors, path, metadata={"format": "pt", "more": "x"})
    assert pymerge.verify(out, sample=1).inputs[0].startswith("b/model.safetensors: has ")


def test_a_single_file(out):
    pymerge.merge(RECIPE, "x.safetensors")
    assert pymerge.verify("x.safetensors").ok


def test_where_relative_paths_start(out, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pymerge.verify(out).ok, "models beside the output are found"
    shutil.move(out, tmp_path / "elsewhere/out")
    out = tmp_path / "elsewhere/out"
    with pytest.raises(RecipeError, match="'base' does not exist"):
        pymerge.verify(out)
    assert pymerge.verify(out, folder="..").ok
    assert pymerge.verify(out, folder=tmp_path).ok


def test_what_cannot_be_verified(out):
    with pytest.raises(CheckpointError, match="a: does not say how it was made: it has no pymerge.json, and no pymerge_recipe"):
        pymerge.verify("a")
    with pytest.raises(ValueError, match="sample is 0"):
        pymerge.verify(out, sample=0)
    good = json.loads((out / "pymerge.json").read_text())
    for wrong in (
        {},
        [],
        {**good, "recipe": 3},
        {**good, "inputs": [{}]},
        {**good, "recipe": "{["},
        {**good, "recipe": "!!python/object:x.Y {}"},
    ):
        (out / "pymerge.json").write_text(json.dumps(wrong))
        with pytest.raises((CheckpointError, RecipeError), match="pymerge.json"):
            pymerge.verify(out)
    (out / "pymerge.json").unlink()
    assert pymerge.verify(out).ok, "the weights say it too"


def test_a_result_that_others_use(out, tmp_path):
    (tmp_path / "r.yml").write_text("""
name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
---
name: second
merge_method: slerp
base_model: first
models: [{model: base}]
parameters: {t: 0.3}
""")
    pymerge.merge("r.yml", "all")
    assert pymerge.verify("all/first").ok and pymerge.verify("all/second", sample=None).ok


def test_command(out):
    done = run("verify", "out", cwd=out.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out: 12 of 12 tensors compared, all the same\n", "")
    assert run("verify", "-q", "out", "--sample", "2", cwd=out.parent).stdout == ""
    change(out, "model.norm.weight", 2)
    done = run("verify", "out", "--all", cwd=out.parent)
    assert done.returncode == 1 and done.stdout == (
        "model.norm.weight: differs from byte 4 (element 2) on\n"
        "out: is not what its recipe gives now; 12 of 12 tensors compared, 1 differ\n"
    )
    content = json.loads(run("verify", "out", "--json", cwd=out.parent).stdout)
    assert content["ok"] is False and content["differences"] == [["model.norm.weight", "differs from byte 4 (element 2) on"]]
    done = run("verify", "a", cwd=out.parent)
    assert done.returncode == 2 and done.stderr.startswith("error: a: does not say how it was made")
    shutil.rmtree(out.parent / "a")
    done = run("verify", "out", cwd=out.parent)
    assert done.returncode == 2 and "'a' does not exist" in done.stderr and "Traceback" not in done.stderr
    os.makedirs(out.parent / "moved")
    for name in ("base", "b"):
        shutil.move(out.parent / name, out.parent / "moved" / name)
    save_model(out.parent / "moved/a", tensors_of(1), 2)
    assert run("verify", "out", "--folder", "moved", cwd=out.parent).returncode == 1
