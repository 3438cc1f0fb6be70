"""An adapter says how it was made, and `pymerge verify` makes it again; nothing unfinished is ever taken for one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint.format import CheckpointError, InputChangedError
from pymerge.recipe import RecipeError
from tests.cli.test_commands import environment, run

from .adapters import save_adapter
from .files import save_model, tensors_of, tree
from .test_adapters import pairs
from .test_extract import tuned_by


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "a", pairs(0, 3), lora_alpha=7, base_model_name_or_path="org/base")
    save_adapter(tmp_path / "b", pairs(1, 4), use_rslora=True, base_model_name_or_path="org/base")
    save_model(tmp_path / "base", tensors_of(0))
    save_model(tmp_path / "tuned", tuned_by(tensors_of(0), 2))
    return tmp_path


MERGES = [
    {"method": "cat", "weights": [0.5, -2]},
    {"method": "svd", "rank": 3, "dtype": "bfloat16"},
    {"method": "ties", "parameters": {"density": [0.5, 0.25]}, "energy": 0.9},
    {"method": "dare_linear", "parameters": {"density": 0.5, "seed": 3}, "rank": 2},
    {"method": "linear", "on": "factors"},
]


@pytest.mark.parametrize("options", MERGES, ids=lambda options: options["method"])
def test_merged(options):
    """Bit for bit, from the recipe in pymerge.json, which `pymerge merge` takes too; and again by the card's command."""
    if options.get("on") == "factors":
        save_adapter(Path("b"), pairs(1, 3), base_model_name_or_path="org/base")
    pymerge.merge_adapters(["a", "b"], "out", **options)
    report = pymerge.verify("out", sample=None)
    assert report.ok and len(report.checked) == report.tensors == 6 and report.version == pymerge.__version__
    recipe = json.loads(Path("out/pymerge.json").read_text())["recipe"]
    Path("again.yml").write_text(recipe)
    pymerge.merge("again.yml", "again")
    assert tree(Path("again")) == tree(Path("out"))
    card = Path("out/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "org/base" and front["library_name"] == "peft" and recipe.rstrip() in card
    assert "pymerge merge recipe.yml OUT" in card and "`adapter_model.safetensors`" in card


def test_any_base_is_recorded():
    save_adapter(Path("b"), pairs(1, 4), base_model_name_or_path="org/other")
    pymerge.merge_adapters(["a", "b"], "out", check_base=False)
    assert pymerge.verify("out").ok
    Path("r.yml").write_text("merge_method: cat\nmodels: [{model: a}, {model: b}]\nparameters: {any_base: maybe}\n")
    with pytest.raises(RecipeError, match="any_base: is 'maybe', neither true nor false"):
        pymerge.merge("r.yml", "new")


def test_progress():
    for make in (pymerge.merge_adapters, lambda _, out, progress: pymerge.extract_lora("tuned", "base", out, progress=progress)):
        seen = []
        make(["a", "b"], f"out{len(list(Path('.').iterdir()))}", progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert len(seen) >= 3 and seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


def test_the_same_bytes_wherever_they_go():
    pymerge.merge_adapters(["a", "b"], "out")
    pymerge.merge_adapters(["a", "b"], "deep/elsewhere")
    assert tree(Path("out")) == tree(Path("deep/elsewhere"))
    pymerge.extract_lora("tuned", "base", "x")
    pymerge.extract_lora("tuned", "base", "deep/y")
    assert tree(Path("x")) == tree(Path("deep/y"))


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"energy": 1, "rank": None, "whole": ["lm_head"]}, {"modules": "q_proj", "dtype": "float16"}]
)
def test_extracted(options):
    pymerge.extract_lora("tuned", "base", "out", **options)
    assert pymerge.verify("out", sample=None).ok
    some = pymerge.verify("out", sample=1)
    assert some.ok and len(some.checked) == 2
    words = next(line for line in Path("out/README.md").read_text().splitlines() if line.startswith("pymerge lora extract")).split()
    again = run(*[word.strip("'") if word != "OUT" else "again" for word in words[1:]], cwd=Path.cwd())
    assert again.returncode == 0, again.stderr
    assert tree(Path("again")) == tree(Path("out"))


def change(folder, name, element):
    path = Path(folder, "adapter_model.safetensors")
    tensors = load_file(path)
    tensors[name].view(-1)[element] += 1
    save_file(tensors, path)


def test_what_differs_is_found():
    pymerge.merge_adapters(["a", "b"], "out")
    name = "base_model.model.model.layers.1.q.lora_B.weight"
    change("out", name, 5)
    done = run("verify", "out", "--all", cwd=Path.cwd())
    assert done.returncode == 1 and f"{name}: differs from element 5 on, by" in done.stdout and "1 differ" in done.stdout
    pymerge.merge_adapters(["a", "b"], "out", force=True)
    config = json.loads(Path("out/adapter_config.json").read_text())
    Path("out/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    report = pymerge.verify("out", sample=None)
    assert ("model.layers.0.q", "has the scale 14.1429; it would be 4") in report.differences
    Path("out/adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    assert pymerge.verify("out", sample=None).differences == (("adapter_config.json", "is not what it would be"),)


def test_inputs_that_are_others_now():
    pymerge.merge_adapters(["a", "b"], "out")
    change("a", "base_model.model.model.layers.0.q.lora_A.weight", 0)
    report = pymerge.verify("out", sample=None)
    assert not report.ok and "a/adapter_model.safetensors: its SHA-256 is" in report.inputs[0]
    Path("a").rename("c")
    done = run("verify", "out", cwd=Path.cwd())
    assert done.returncode == 2 and "'a', which it was made of, cannot be found" in done.stderr and "--folder" in done.stderr


def test_relative_names_are_found(work, monkeypatch):
    pymerge.merge_adapters(["a", "b"], "out")
    monkeypatch.chdir("/")
    assert pymerge.verify(work / "out").ok, "beside the output"
    (work / "sub").mkdir()
    for name in "ab":
        (work / name).rename(work / "sub" / name)
    with pytest.raises(CheckpointError, match="cannot be found"):
        pymerge.verify(work / "out")
    assert pymerge.verify(work / "out", folder=work / "sub").ok


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not say how it was made"),
        ("{}", "pymerge.json: is not as pymerge writes it"),
        ('{"pymerge_version": "1", "inputs": []}', "neither a recipe nor an extraction"),
        ('{"pymerge_version": "1", "inputs": [], "recipe": "merge_method: cat"}', "its recipe is not one of adapters"),
        ('{"pymerge_version": "1", "inputs": [], "extract": {"model": "tuned", "base": "base", "rank": "x"}}', "extract.rank is 'x'"),
        ('{"pymerge_version": "1", "inputs": [], "extract": {"model": 3, "base": "base"}}', "3, which it was made of, cannot be found"),
    ],
)
def test_records_that_make_no_sense(content, message):
    pymerge.merge_adapters(["a", "b"], "out")
    Path("out/pymerge.json").unlink()
    if content is not None:
        Path("out/pymerge.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        pymerge.verify("out")


def test_killed_while_it_is_written():
    """Nothing that looks finished, inputs untouched, and the same command makes it as if nothing had been."""
    before = tree(Path("."))
    code = (
        "import os, signal, pymerge\nfrom pymerge.checkpoint.writer import CheckpointWriter\n"
        "CheckpointWriter.commit = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pymerge.merge_adapters(['a', 'b'], 'out')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    left = tree(Path("."))
    assert {name: left[name] for name in before} == before
    assert not os.path.exists("out") and os.path.exists("out.partial")
    pymerge.merge_adapters(["a", "b"], "out")
    pymerge.merge_adapters(["a", "b"], "fresh")
    assert tree(Path("out")) == tree(Path("fresh")) and not os.path.exists("out.partial")


def test_an_input_that_changes_meanwhile(monkeypatch):
    from pymerge.checkpoint.lora import job

    original = job.MergeJob.merge

    def merge(self, name):
        result = original(self, name)
        if name == self.names[-1]:
            os.utime("b/adapter_model.safetensors", ns=(1, 1))
        return result

    monkeypatch.setattr(job.MergeJob, "merge", merge)
    with pytest.raises(InputChangedError, match="b/adapter_model.safetensors: changed during the merge: it was written to"):
        pymerge.merge_adapters(["a", "b"], "out")
    assert not os.path.exists("out") and not os.path.exists("out.partial")


@pytest.mark.parametrize("out", ["tuned", "base", "base/inside"])
def test_an_extraction_does_not_replace_its_models(out):
    before = tree(Path("."))
    with pytest.raises(FileExistsError, match="an input of the merge"):
        pymerge.extract_lora("tuned", "base", out, force=True)
    assert tree(Path(".")) == before


def test_command_line():
    Path("r.yml").write_text("merge_method: svd\nmodels: [{model: a}, {model: b}]\nparameters: {rank: 2}\n")
    plan = run("plan", "r.yml", "out", cwd=Path.cwd())
    assert (
        plan.returncode == 0
        and "adapter  a  (3 modules, rank 3, " in plan.stdout
        and "merge    3 modules into a new adapter" in plan.stdout
    )
    assert json.loads(run("plan", "r.yml", "--json", cwd=Path.cwd()).stdout)["adapter"]["modules"] == 3 and not os.path.exists("out")
    done = run("merge", "r.yml", "out", "--resume", "--memory", "1GB", cwd=Path.cwd())
    assert done.returncode == 0 and done.stderr == "warning: --resume, --memory: without effect, adapters are merged in one go\n"
    verified = run("verify", "out", cwd=Path.cwd())
    assert (verified.returncode, verified.stdout) == (0, "out: 6 of 6 tensors compared, all the same\n")
    inspected = run("inspect", "out", "-t", cwd=Path.cwd())
    assert inspected.returncode == 0 and "model.layers.0.q.lora_A.weight" in inspected.stdout
    for args in (("lora", "merge", "a", "nowhere", "-o", "new"), ("lora", "extract", "tuned", "nowhere", "new"), ("inspect", ".")):
        refused = run(*args, cwd=Path.cwd())
        assert refused.returncode == 2 and refused.stderr.startswith("error: "), "bad input: nothing was started"
    taken = run("plan", "r.yml", "out", cwd=Path.cwd())
    assert taken.returncode == 2 and "exists already" in taken.stderr
    save_adapter(Path("b"), {"m": (torch.full((2, 3), float("nan")), torch.ones(4, 2))}, base_model_name_or_path="org/base")
    bad = run("merge", "r.yml", "new", cwd=Path.cwd())
    assert bad.returncode == 1 and "has NaN or Inf" in bad.stderr and "--no-check-finite" not in bad.stderr, "which adapters do not have"
