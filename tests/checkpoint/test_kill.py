"""SIGKILL or a power cut at any call to the system: inputs stay, nothing looks finished that is not, and resuming gives the same bytes."""

import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch

from pymerge.checkpoint import journal, memory, partial, writer
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.reader import open_checkpoint

from .files import save_model, tensors_of, tree

CALLS = ("preadv", "pwrite", "ftruncate", "fsync", "fdatasync", "write", "rename", "replace", "unlink", "rmdir", "mkdir")
PWRITE, TRUNCATE = os.pwrite, os.ftruncate
RECIPE = {
    "merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 1, "density": 0.5},
}  # fmt: skip


SHARD = 4000  # bytes, which makes three shards


class Counted:
    """Kills the process just before its call number `last` to the system; if `power` is cut, what was not flushed is undone before."""

    def __init__(self, last, power):
        self.calls = []
        self._last, self._power = last, power
        self._lock = threading.RLock()
        self._unflushed = {}  # inode -> [descriptor of its own, [(offset, bytes before), ...]]
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        partial.exchange = self._counted("exchange", partial.exchange)
        writer.datasync = journal.datasync = os.fdatasync

    def _counted(self, name, original):
        def call(*args, **options):
            with self._lock:
                if len(self.calls) == self._last:
                    self._die()
                self.calls.append(name)
                if name in ("pwrite", "write"):
                    self._remember(args[0], args[2] if name == "pwrite" else os.fstat(args[0]).st_size, len(args[1]))
                result = original(*args, **options)
                if name in ("fsync", "fdatasync"):
                    self._unflushed.pop(os.fstat(args[0]).st_ino, None)
            return result

        return call

    def _remember(self, fd, offset, count):
        inode = os.fstat(fd).st_ino
        own = self._unflushed.setdefault(inode, [os.open(f"/proc/self/fd/{fd}", os.O_RDWR), []])
        own[1].append((offset, os.pread(own[0], count, offset)))

    def _die(self):
        if self._power:
            for fd, writes in self._unflushed.values():
                for offset, before in reversed(writes):
                    if before:
                        PWRITE(fd, before, offset)
                    else:
                        TRUNCATE(fd, offset)
        os.kill(os.getpid(), signal.SIGKILL)


def in_child(work):
    """Run in a copy of this process, which is far cheaper than importing torch anew; how it ended."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def run(folder, last, how):
    """A merge over an older output, killed at call `last`."""

    def work():
        counted = Counted(last, how == "power cut")
        if how == "two renames":
            partial.exchange = lambda a, b: False
        memory.BATCH = 1  # a job per tensor
        writer.MOST_OPEN = 0  # flush and record after each tensor
        merge(RECIPE, "out", force=True, resume=True, shard_size=SHARD, threads=1)
        (folder / "calls").write_text("\n".join(counted.calls))

    return in_child(work)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        save_model(tmp_path / name, tensors_of(i, layers=1), 1 + i % 2)
    merge(RECIPE, "expected", shard_size=SHARD)
    merge({**RECIPE, "parameters": {"weight": 0.5, "density": 1}}, "old")
    return tmp_path


def old_output(folder):
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.copytree(folder / "old", folder / "out")


def points(calls, every, seed=0):
    """Each call of the end, where the output gets its name, and some of those before."""
    end = len(calls) - calls[::-1].index("write") - 1  # the journal's "commit"
    return [*range(seed % every, end - 1, every), *range(end - 1, len(calls))]


@pytest.mark.parametrize("how", ["exchange", "two renames", "power cut"])
@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_at_a_call(work, how, every):
    inputs = {name: tree(work / name) for name in ("base", "a", "b")}
    expected, old = tree(work / "expected"), tree(work / "old")
    old_output(work)
    assert run(work, -1, how) == 0
    calls = (work / "calls").read_text().split("\n")
    assert tree(work / "out") == expected and {"preadv", "pwrite", "fdatasync", "rename" if how == "two renames" else "exchange"} <= set(
        calls
    )
    seen = set()
    for last in points(calls, every):
        old_output(work)
        assert os.WTERMSIG(run(work, last, how)) == signal.SIGKILL, f"call {last} did not come"
        assert {name: tree(work / name) for name in inputs} == inputs
        here = tree(work / "out") if (work / "out").exists() else None
        assert here in (old, expected) or (here is None and how == "two renames")
        nothing_looks_finished(work, expected, old)
        seen.add((here == old, (work / "out.partial").exists()))
        report = merge(RECIPE, "out", force=True, resume=True, shard_size=SHARD)
        assert tree(work / "out") == expected, f"after a kill at call {last}, {calls[last]}"
        assert report.tensors == 6 and not (work / "out.partial").exists()
    assert {(True, True), (False, True)} <= seen


def nothing_looks_finished(folder, *whole):
    """Whatever can be opened as a checkpoint has all of its weights."""
    for path in folder.glob("out.partial*/*"):
        if path.is_dir():
            try:
                open_checkpoint(path)
            except CheckpointError:
                continue
            weights = {name: content for name, content in tree(path).items() if name.endswith(".safetensors")}
            assert any(weights.items() <= content.items() for content in whole)


def slowly(call):
    return lambda *args: (time.sleep(0.002), call(*args))[1]


@pytest.mark.slow
def test_killed_at_random_times(work):
    """As people do it: a process of its own, killed from outside at any moment of it, several times over."""
    inputs, expected = {name: tree(work / name) for name in ("base", "a", "b")}, tree(work / "expected")

    def throttled():
        memory.BATCH = 1
        writer.MOST_OPEN = 0
        for name in ("preadv", "pwrite", "fsync", "replace"):
            setattr(os, name, slowly(getattr(os, name)))
        merge(RECIPE, "out", resume=True, shard_size=SHARD)

    began = time.monotonic()
    assert in_child(throttled) == 0
    whole = time.monotonic() - began
    killed, generator = 0, torch.Generator().manual_seed(0)
    while killed < 12:
        shutil.rmtree(work / "out", ignore_errors=True)
        for _ in range(20):  # a merge that is killed again and again gets on nevertheless
            pid = os.fork()
            if not pid:
                try:
                    torch.set_num_threads(1)
                    throttled()
                finally:
                    os._exit(0)
            time.sleep(float(torch.rand((), generator=generator)) * whole)
            os.kill(pid, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            assert {name: tree(work / name) for name in inputs} == inputs
            nothing_looks_finished(work, expected)
            if (work / "out").exists():
                break
        merge(RECIPE, "out", resume=True, shard_size=SHARD, force=True)
        assert tree(work / "out") == expected and not (work / "out.partial").exists()
