"""What only a process of its own can show: being killed, how much memory it takes, what a terminal sees."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.checkpoint.files import save_model, tree

from .test_commands import environment, run

SLOW = """
import sys, time
from pymerge.checkpoint import memory, merge, writer
memory.BATCH = 1
original = writer.CheckpointWriter.write
def write(self, name, data, start=0):
    original(self, name, data, start)
    print(name, flush=True)
    time.sleep(0.05)
writer.CheckpointWriter.write = write
from pymerge.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def models(tmp_path):
    for name in "ab":
        save_model(tmp_path / name, {f"w{i:02d}": torch.ones(1000) for i in range(40)})
    (tmp_path / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n")
    return tmp_path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_killed(models, number, code):
    before = tree(models)
    command = [sys.executable, "-c", SLOW, "merge", "r.yml", "out"]
    process = subprocess.Popen(command, cwd=models, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    for _ in range(3):
        assert process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert not (models / "out").exists()
    if number == signal.SIGKILL:
        assert errors == ""
    else:
        assert "Traceback" not in errors
        assert re.search("out.partial keeps the [0-9]+ of 40 tensors that are done .*the same command with --resume", errors)
    done = run("plan", "r.yml", "out", cwd=models)
    assert done.returncode == 2 and "out.partial: holds an unfinished merge; continue it with --resume" in done.stderr
    done = run("merge", "r.yml", "out", "--resume", cwd=models)
    assert done.returncode == 0 and done.stderr == ""
    assert bool(re.match("[0-9]+ tensors were done before\n", done.stdout)) == (number != signal.SIGKILL)
    run("merge", "r.yml", "whole", cwd=models)
    assert tree(models / "out") == tree(models / "whole")
    assert {name: content for name, content in tree(models).items() if not name.startswith(("out", "whole"))} == before


def test_file_size_limit(models):
    """A real limit of the system's, as a full disk or a quota is one."""
    before = tree(models)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n" + SLOW
    command = [sys.executable, "-c", limited, "merge", "r.yml", "out"]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 1
    advice = "that file system does not take files of this size: write smaller ones (of models: --shard-size), or to another disk"
    assert done.stderr == f"error: {models}/out.partial/output/model.safetensors: File too large; {advice}\n"
    assert tree(models) == before


MEASURED = """
import json, resource, sys, threading
import torch, pymerge, pymerge.checkpoint.merge
for n in (1 << 16, 1 << 21):
    x = [torch.randn(n).bfloat16() for _ in range(5)]
    pymerge.ties(x[0], x[1:])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
pymerge.merge(sys.argv[1], sys.argv[2])
print(json.dumps(peak() - before))
"""


def test_memory_stays_near_the_largest_tensor(tmp_path):
    """1.6 GB pass through; a model alone is 320 MB."""
    names = ["base", "a", "b", "c"]
    for i, name in enumerate(names):
        g = torch.Generator().manual_seed(i)
        one = torch.randn(2**22, generator=g).bfloat16()
        save_model(tmp_path / name, {f"w{j:02d}": one.roll(j) for j in range(40)})
    recipe = {
        "merge_method": "ties", "base_model": "base", "models": [{"model": n} for n in names[1:]],
        "parameters": {"weight": 1, "density": 0.2},
    }  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "r.json", "out"], cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=250
    )
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout)
    assert growth < 120e6, f"{growth / 1e6:.0f} MB"


def test_progress_bar_on_a_terminal(models):
    master, slave = pty.openpty()
    command = [sys.executable, "-c", SLOW, "merge", "r.yml", "out"]
    process = subprocess.Popen(
        command, cwd=models, stdout=subprocess.DEVNULL, stderr=slave, env={**environment(), "TERM": "xterm"}, close_fds=True
    )
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert process.wait(timeout=30) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "merging" in text and "kB" in text and "/s" in text


@pytest.mark.parametrize(
    ("variable", "value", "message", "command", "status"),
    [
        ("PYMERGE_ISA", "sve9", "instruction set 'sve9' is not available", "merge", 1),
        ("PYMERGE_BACKEND", "abacus", "backend 'abacus' does not exist", "plan", 2),
    ],
)
def test_settings_that_cannot_be_met_are_told_before_anything_is_read(models, variable, value, message, command, status):
    command = [sys.executable, "-m", "pymerge", command, "r.yml", "out"]
    done = subprocess.run(command, cwd=models, env={**environment(), variable: value}, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr
    assert not (models / "out").exists()
