"""The commands: what they print, on which stream, and with which status they exit."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.cli import main
from pymerge.cli.main import COMMANDS
from tests.checkpoint.files import raw, save_model, tensors_of, tree

ROOT = Path(pymerge.__file__).parent.parent


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def run(*args, cwd):
    """The command line in this process: importing torch anew for each call would take most of the tests' time."""
    out, err = io.StringIO(), io.StringIO()
    here, handler = os.getcwd(), signal.getsignal(signal.SIGTERM)
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
    finally:
        os.chdir(here)
        signal.signal(signal.SIGTERM, handler)
    return SimpleNamespace(returncode=ended.value.code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture
def models(tmp_path):
    save_model(tmp_path / "a", tensors_of(0))
    save_model(tmp_path / "b", tensors_of(1), 2)
    (tmp_path / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n")
    return tmp_path


def test_merge(models):
    done = run("merge", "r.yml", "out", cwd=models)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "quiet when not a terminal"
    assert done.stdout.startswith("out: 12 tensors, ") and "merged by linear in" in done.stdout
    a, b, out = tensors_of(0), tensors_of(1), load_file(models / "out/model.safetensors")
    assert all(torch.equal(out[n], pymerge.linear([a[n], b[n]], weights=0.5)) for n in a)

    again = run("merge", "r.yml", "out", cwd=models)
    assert again.returncode == 2 and "exists already and is not empty" in again.stderr and "Traceback" not in again.stderr
    forced = run("merge", "-q", "-f", "r.yml", "out", "--shard-size", "5KB", "--out-dtype", "bfloat16", "--threads", "1", cwd=models)
    assert (forced.returncode, forced.stdout, forced.stderr) == (0, "", "")
    assert "model.safetensors.index.json" in tree(models / "out") and "model.safetensors" not in tree(models / "out")


def test_bad_recipe(models):
    (models / "r.yml").write_text("merge_method: liner\nmodels: [{model: a}, {model: c}]\nparameters: {weight: 0.5}\ndtyp: x\n")
    before = tree(models)
    for command in (["merge", "r.yml", "out"], ["plan", "r.yml"]):
        done = run(*command, cwd=models)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.splitlines() == [
            "3 problems, nothing was read or written:",
            "  r.yml:1: merge_method: there is no method 'liner'; did you mean 'linear'?",
            f"  r.yml:2: models[1].model: 'c' does not exist (looked at {models / 'c'})",
            "  r.yml:4: dtyp: unknown key; did you mean 'dtype'?",
        ]
    assert tree(models) == before


def test_failure_while_merging(models):
    bad = tensors_of(1)
    bad["model.norm.weight"][3] = float("nan")
    save_model(models / "c", bad)
    (models / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: c}]\nparameters: {weight: 0.5}\n")
    done = run("merge", "r.yml", "out", cwd=models)
    assert done.returncode == 1
    assert done.stderr == (
        "error: c: 'model.norm.weight' has 1 non-finite value(s), the first nan at index [3]; --no-check-finite merges it anyway\n"
    )
    assert not list(models.glob("out*"))
    assert run("merge", "r.yml", "out", "--no-check-finite", cwd=models).returncode == 0


def test_plan(models):
    done = run("plan", "r.yml", "out", cwd=models)
    assert done.returncode == 0 and not (models / "out").exists()
    assert "merge    12 tensors" in done.stdout and "in 2 files" in done.stdout and "memory   about" in done.stdout
    [content] = json.loads(run("plan", "--json", "-t", "r.yml", cwd=models).stdout)["merges"]
    total = sum(t.nbytes for t in tensors_of(0).values())
    assert (content["bytes_read"], content["bytes_written"], content["tensors"]) == (2 * total, total, 12)
    assert [m["role"] for m in content["models"]] == ["model", "model"]
    assert content["tensor_list"][0]["parameters"] == {"weights": [0.5, 0.5], "normalize": True}
    assert "weights=0.5, normalize=True" in run("plan", "-t", "r.yml", cwd=models).stdout
    assert "is too small; it must be at least" in run("plan", "--memory", "1MB", "r.yml", cwd=models).stderr


def test_plan_says_how_long(models):
    """Reading and merging are measured on a part of the tensors, writing has the rate given."""
    before = tree(models)
    done = run("plan", "r.yml", "--write-rate", "1KB", cwd=models)
    size = sum(t.nbytes for t in tensors_of(0).values())
    assert re.search(rf"time     about {size / 1000:.2g} s: reading .*/s, writing {size / 1000:.3g} kB at 1 kB/s; merging at", done.stdout)
    guess = json.loads(run("plan", "r.yml", "--json", cwd=models).stdout)["estimate"]
    assert (guess["bytes_read"], guess["bytes_written"], guess["passes"]) == (2 * size, size, 1)
    assert guess["read_rate"] > 0 and guess["merge_rate"] > 0 and guess["write_rate"] == 500e6 and guess["sampled"] == 2 * size
    expected = 2 * size / guess["read_rate"] + size / guess["write_rate"]
    assert guess["seconds"] == pytest.approx(max(expected, 3 * size / guess["merge_rate"]))
    assert tree(models) == before


def test_plan_of_several_recipes(models):
    (models / "many.yml").write_text(
        "merge_method: linear\nmodels: [{model: stage}, {model: b}]\nparameters: {weight: 0.5}\n---\n"
        "name: stage\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
    )
    done = run("plan", "many.yml", "out", cwd=models)
    assert (
        done.returncode == 0
        and done.stdout.index("stage\nmethod") < done.stdout.index("merged\nmethod")
        and done.stdout.count("time ") == 1
    )
    assert "stage  (12 tensors, 14.6 kB, not merged yet)" in done.stdout and "copy     config and tokenizer of out/stage" in done.stdout
    content = json.loads(run("plan", "many.yml", "out", "--json", cwd=models).stdout)
    assert [(m["name"], m["out"]) for m in content["merges"]] == [("stage", "out/stage"), ("merged", "out/merged")]
    assert content["estimate"]["bytes_read"] == sum(m["bytes_read"] for m in content["merges"])
    assert run("merge", "-q", "many.yml", "out", cwd=models).returncode == 0
    assert "nothing to do: every result is there" in run("plan", "many.yml", "out", cwd=models).stdout
    there = json.loads(run("plan", "many.yml", "out", "--json", cwd=models).stdout)
    assert (there["merges"], there["there_already"]) == ([], ["out/stage", "out/merged"])


def test_methods(models):
    done = run("methods", cwd=models)
    assert all(name in done.stdout for name in pymerge.methods())
    content = json.loads(run("methods", "--json", cwd=models).stdout)
    assert [m["name"] for m in content["methods"]] == list(pymerge.methods())
    one = run("methods", "ties", cwd=models).stdout
    assert "density" in one and "needs a base_model" in one and "required, may differ by model" in one
    wrong = run("methods", "tees", cwd=models)
    assert wrong.returncode == 2 and "did you mean 'ties'?" in wrong.stderr


def test_inspect(models):
    run("merge", "r.yml", "out", cwd=models)
    done = run("inspect", "out", "--metadata", "--tensors", cwd=models)
    assert (
        "12 tensors" in done.stdout and "merge_method: linear" in done.stdout and re.search(r"lm_head.weight +F32 +\[40, 16\]", done.stdout)
    )
    content = json.loads(run("inspect", "b", "--json", cwd=models).stdout)
    assert len(content["files"]) == 2 and content["dtypes"] == {"F32": {"tensors": 12, "parameters": 3648, "bytes": 14592}}
    assert [layer["name"] for layer in content["layers"]] == [
        "lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm",
    ]  # fmt: skip
    assert sum(layer["bytes"] for layer in content["layers"]) == content["bytes"]
    index = run("inspect", "b/model.safetensors.index.json", "--layers", cwd=models)
    assert index.returncode == 0 and re.search(r"model.layers.1 +3 +784 +3.14 kB +F32", index.stdout)
    (models / "bad.safetensors").write_bytes(raw({}, length=100))
    bad = run("inspect", "bad.safetensors", cwd=models)
    assert bad.returncode == 2 and bad.stderr == (
        "error: bad.safetensors: truncated: header of 100 bytes announced, but the file has 10 bytes in all; copy or download it again\n"
    )


def test_names_cannot_control_the_terminal(models):
    save_model(models / "evil", {"\x1b[2Jw": torch.ones(2)})
    done = run("inspect", "-t", "evil", cwd=models)
    assert "\x1b" not in done.stdout and r"\x1b[2Jw" in done.stdout


def test_usage(models):
    help_text = run("--help", cwd=models).stdout
    assert all(word in help_text for word in ("merge", "plan", "methods", "inspect", "Exit status: 0 done", "130 interrupted"))
    for command in COMMANDS:
        assert run(command, "--help", cwd=models).returncode == 0
    assert run("--version", cwd=models).stdout == f"pymerge {pymerge.__version__}\n"
    wrong = run("mrge", "r.yml", cwd=models)
    assert wrong.returncode == 2 and "Did you mean 'merge'?" in wrong.stderr
    assert "pymerge merge r.yml OUT" in run("r.yml", cwd=models).stderr
    assert run("merge", "r.yml", cwd=models).returncode == 2
    assert "is not a size" in run("merge", "r.yml", "out", "--shard-size", "5 apples", cwd=models).stderr
    assert run("merge", "none.yml", "out", cwd=models).returncode == 2


def test_as_a_process(models):
    """`python -m pymerge`, into a pipe whose reader has gone."""
    done = subprocess.run(
        f"{sys.executable} -m pymerge methods --json | true", shell=True, cwd=models, capture_output=True, text=True, env=environment()
    )
    assert done.stderr == ""


def test_defects_are_not_hidden(models, monkeypatch):
    """What is none of our errors is a defect of pymerge and keeps its traceback."""
    monkeypatch.setattr("pymerge.checkpoint.many.make_plan", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan", str(models / "r.yml")])


def test_help_is_light():
    """The command line itself loads neither torch nor rich nor YAML before a command needs them."""
    code = (
        "import sys, types; p = types.ModuleType('pymerge'); p.__path__ = [sys.argv[1]]; sys.modules['pymerge'] = p\n"
        "from pymerge.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'rich', 'yaml', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "pymerge")], check=True, stdout=subprocess.DEVNULL, timeout=60)
