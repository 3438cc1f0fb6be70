"""--json: one object on stdout and nothing else, with the same keys every time, also when something goes wrong."""

import json
import subprocess
import sys

import pytest
import torch

from pymerge.cli.main import COMMANDS
from tests.checkpoint.files import raw, save_model, tensors_of

from .test_commands import environment, run

SIZES = {"tensors", "parameters", "bytes"}
DRIFT = {"name", "tensors", "elements", "bytes", "relative_drift", "max_abs", "cosine", "changed", "changed_fraction"}
PLAN = {
    "name", "out", "merge_method", "recipe", "models", "tensors", "copied_tensors", "bytes_read", "bytes_written", "memory_bytes", "files",
    "config_from", "warnings", "device",
}  # fmt: skip
MERGE = {"out", "merge_method", "files", "tensors", "bytes_read", "bytes_written", "seconds", "stages", "warnings", "device"}
KEYS = {
    "merge/1": {"merges", "there_already"},
    "plan/2": {"merges", "there_already", "memory_bytes", "estimate"},
    "inspect/1": {"path", "files", "dtypes", "layers", *SIZES},
    "diff/1": {"a", "b", "equal", "total", "by", "rows", "only_in_a", "only_in_b", "different_shape", "different_dtype"},
    "verify/1": {"out", "ok", "version", "tensors", "checked", "differences", "inputs"},
    "methods/1": {"methods"},
    "bench/1": {"machine", "memory", "disk", "methods", "skipped"},
    "error/1": {"kind", "message", "exit_status"},
}  # fmt: skip


@pytest.fixture
def models(tmp_path):
    save_model(tmp_path / "a", tensors_of(0))
    save_model(tmp_path / "b", tensors_of(1))
    (tmp_path / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n")
    return tmp_path


def document(*args, cwd):
    """The object that a command prints; stderr stays empty for what is no terminal and takes no time."""
    done = run(*args, "--json", cwd=cwd)
    assert done.stderr == ""
    content = json.loads(done.stdout)
    schema = content.pop("schema")
    assert done.stdout.startswith('{\n  "schema": ')
    if schema in KEYS:
        assert set(content) >= KEYS[schema]
        assert set(content) <= KEYS[schema] | {"problems", "tensor_list"}
    return schema, content, done.returncode


def test_every_command_that_reports(models):
    schema, content, code = document("plan", "r.yml", cwd=models)
    assert (schema, code, set(content["merges"][0])) == ("plan/2", 0, PLAN)
    schema, content, code = document("merge", "r.yml", "out", cwd=models)
    [content] = content["merges"]
    assert set(content) >= MERGE and (schema, code, content["tensors"]) == ("merge/1", 0, 12)
    assert [file["bytes"] for file in content["files"]] == [(models / "out" / f).stat().st_size for f in names(content)]
    assert (
        content["stages"]["reading"]["bytes"] == content["bytes_read"] and content["stages"]["writing"]["bytes"] == content["bytes_written"]
    )
    assert all(stage["seconds"] > 0 for stage in content["stages"].values())
    assert document("verify", "out", cwd=models)[0] == "verify/1"
    assert document("inspect", "out", cwd=models)[0] == "inspect/1"
    assert document("methods", "ties", cwd=models)[0] == "methods/1"
    schema, content, code = document("diff", "a", "b", cwd=models)
    assert (schema, code, content["equal"], content["total"].keys()) == ("diff/1", 1, False, DRIFT)
    schema, about, code = document("env", cwd=models)
    assert (schema, code) == ("env/1", 0) and {"pymerge", "python", "torch", "triton", "isa", "cpu", "cores", "os"} <= set(about)


def names(content):
    return [file["path"].rpartition("/")[2] for file in content["files"]]


def test_what_json_cannot_say_is_null(models):
    save_model(models / "zero", {"w": torch.zeros(2)})
    save_model(models / "one", {"w": torch.ones(2)})
    total = document("diff", "one", "zero", cwd=models)[1]["total"]
    assert (total["relative_drift"], total["cosine"], total["max_abs"]) == (None, None, 1.0)


@pytest.mark.parametrize(
    ("args", "kind", "status"),
    [
        (("merge", "r.yml"), "usage", 2),
        (("methods", "tees"), "usage", 2),
        (("plan", "bad.yml"), "recipe", 2),
        (("inspect", "bad.safetensors"), "checkpoint", 2),
        (("diff", "a", "bad.safetensors"), "checkpoint", 2),
        (("diff", "a", "b", "--plot", "no/such/folder.png"), "usage", 2),
        (("merge", "nan.yml", "out"), "not_finite", 1),
        (("bench", "tees"), "usage", 2),
        (("bench", "linear", "--size", "99999999G"), "usage", 2),
        (("nonsense",), "usage", 2),
    ],
)
def test_errors(models, args, kind, status):
    save_model(models / "n", {**tensors_of(0), "model.norm.weight": torch.full((16,), float("nan"))})
    (models / "nan.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: n}]\nparameters: {weight: 0.5}\n")
    (models / "bad.yml").write_text("merge_method: liner\nmodels: [{model: a}]\n")
    (models / "bad.safetensors").write_bytes(raw({}, length=100))
    schema, content, code = document(*args, cwd=models)
    assert (schema, content["kind"], content["exit_status"], code) == ("error/1", kind, status, status)
    if kind == "recipe":
        assert content["problems"][0] == {
            "source": "bad.yml", "line": 1, "place": "merge_method", "message": "there is no method 'liner'; did you mean 'linear'?",
        }  # fmt: skip


def test_every_command_has_it():
    """But `completion`, whose output is for a shell, and stays as it is."""
    import importlib

    for name in set(COMMANDS) - {"completion"}:
        command = importlib.import_module(f"pymerge.cli.{name}").command
        for one in getattr(command, "commands", {name: command}).values():
            assert any("--json" in p.opts for p in one.params), one.name


def test_a_real_process_prints_progress_on_stderr_alone(models):
    """A merge that takes longer than the time between two lines of progress."""
    code = (
        "import sys, time\n"
        "from pymerge.checkpoint import memory, writer\nfrom pymerge.cli import main, progress\n"
        "progress.EVERY, progress.TICK, memory.BATCH = 0.05, 0.01, 1\noriginal = writer.CheckpointWriter.write\n"
        "def write(self, *args):\n    original(self, *args)\n    time.sleep(0.05)\n"
        "writer.CheckpointWriter.write = write\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "merge", "r.yml", "out", "--json"]
    done = subprocess.run(command, cwd=models, env=environment(), capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["schema"] == "merge/1"
    lines = done.stderr.splitlines()
    assert len(lines) > 3 and all(line.startswith("merging: ") and "/s" in line for line in lines)
    assert "writing sets the pace: " in lines[-1] and "\x1b" not in done.stderr
