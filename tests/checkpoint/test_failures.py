"""A merge that fails, wherever it fails, ends at once, names the culprit and leaves nothing, or exactly what a resume needs."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from pymerge import NonFiniteError
from pymerge.checkpoint import memory, reader, writer
from pymerge.checkpoint.format import CheckpointError, InputChangedError
from pymerge.checkpoint.merge import MergeError, merge
from pymerge.checkpoint.ring import Ring, Stopped
from pymerge.checkpoint.writer import CheckpointWriter
from pymerge.merge_methods import registry

from .files import save_model, tensors_of, tree


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """Inputs unchanged, no output, no partial output, no thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "BATCH", 1)  # a job per tensor
    before_threads = threading.active_count()
    files: dict = {}
    yield files
    assert tree(tmp_path) == files["before"]
    assert threading.active_count() == before_threads
    assert not list(tmp_path.glob("out*"))


def models(tmp_path, files, **changes):
    for i, name in enumerate(("base", "a", "b")):
        tensors = tensors_of(i)
        for key, value in changes.get(name, {}).items():
            tensors[key] = value
        save_model(tmp_path / name, tensors)
    files["before"] = tree(tmp_path)


def continued(recipe):
    """What was left is enough to finish with the bytes of a merge that nothing interrupted; then everything is removed."""
    assert os.path.exists("out.partial") and not os.path.exists("out")
    report = merge(recipe, "out", resume=True)
    assert 0 < report.resumed < report.tensors or report.bytes_read == 0
    merge(recipe, "fresh")
    assert tree(Path("out")) == tree(Path("fresh"))
    assert not os.path.exists("out.partial")
    shutil.rmtree("out")
    shutil.rmtree("fresh")


def ties(**more):
    return {
        "merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 1, "density": 0.5}, **more,
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "b"])
def test_not_finite(tmp_path, nothing_is_left, where, value):
    bad = torch.ones(16)
    bad[5] = value
    models(tmp_path, nothing_is_left, **{where: {"model.norm.weight": bad}})
    with pytest.raises(NonFiniteError, match=rf"^{where}: 'model.norm.weight' has 1 non-finite value\(s\), the first .* at index \[5\]"):
        merge(ties(), "out")


def test_not_finite_after_a_cast(tmp_path, nothing_is_left):
    models(tmp_path, nothing_is_left, a={"model.norm.weight": torch.full((16,), 1e5)})
    with pytest.raises(NonFiniteError, match="^a: 'model.norm.weight' .*dtype turned it from F32 into F16"):
        merge(ties(dtype="float16"), "out")


def test_result_overflows(tmp_path, nothing_is_left):
    models(tmp_path, nothing_is_left, a={"model.norm.weight": torch.full((16,), 6e4)})
    with pytest.raises(MergeError, match="'model.norm.weight': the merged values overflow float16"):
        merge(ties(out_dtype="float16", parameters={"weight": 1, "density": 1, "lambda": 4}), "out")


def test_integers_differ(tmp_path, nothing_is_left):
    models(tmp_path, nothing_is_left, **{m: {"ids": torch.arange(3) + i // 2} for i, m in enumerate(("base", "a", "b"))})
    with pytest.raises(MergeError, match="'ids' is of dtype I64, which cannot be merged, and differs between base and b"):
        merge(ties(), "out")


def test_input_truncated_while_merging(tmp_path, nothing_is_left, monkeypatch):
    models(tmp_path, nothing_is_left)
    path = tmp_path / "b/model.safetensors"
    content = path.read_bytes()
    original = reader.Checkpoint.read_into
    count = 0

    def read_into(self, *args):
        nonlocal count
        count += 1
        if count == 12:
            os.truncate(path, 2000)
        original(self, *args)

    monkeypatch.setattr(reader.Checkpoint, "read_into", read_into)
    with pytest.raises(CheckpointError, match="b/model.safetensors: (ends at byte|changed)"):
        merge(ties(), "out", threads=1)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["touched", "replaced", "grown", "removed"])
def test_input_changed_after_it_was_read(tmp_path, nothing_is_left, monkeypatch, how):
    """Also when no read fails: the result would be a mixture of two models, or not what the recipe says."""
    models(tmp_path, nothing_is_left)
    path, other = tmp_path / "a/model.safetensors", tmp_path / "kept"
    before = path.stat()

    def progress(done, total):
        if done == total:
            if how == "touched":
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
            elif how == "replaced":
                shutil.copy2(path, other)
                os.replace(other, path)
            elif how == "grown":
                with open(path, "ab") as file:
                    file.write(b"x")
            else:
                path.unlink()

    content = path.read_bytes()
    expected = {"touched": "it was written to", "replaced": "another file took", "grown": "bytes and has", "removed": "cannot be found"}
    with pytest.raises(InputChangedError, match=f"a/model.safetensors: .*{expected[how]}") as caught:
        merge(ties(), "out", progress=progress)
    assert not getattr(caught.value, "__notes__", ())
    path.write_bytes(content)


def test_read_error(tmp_path, nothing_is_left, monkeypatch):
    """A disk or a network that fails may be back the next time."""
    models(tmp_path, nothing_is_left)
    original, count = os.preadv, 0

    def preadv(fd, buffers, offset):
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(errno.EIO, "Input/output error")
        return original(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(CheckpointError, match="tensor .* cannot be read: Input/output error") as caught:
            merge(ties(), "out", threads=1)
    assert "with --resume" in caught.value.__notes__[0]
    continued(ties())


@pytest.mark.parametrize("at", [0, 5, 11])
def test_writing_fails(tmp_path, nothing_is_left, monkeypatch, at):
    models(tmp_path, nothing_is_left)
    original = CheckpointWriter.write
    count = 0

    def write(self, name, data, start=0):
        nonlocal count
        if count == at:
            raise OSError(28, "No space left on device")
        count += 1
        original(self, name, data, start)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", write)
        with pytest.raises(OSError, match="No space left") as caught:
            merge(ties(), "out")
    if at:
        assert f"out.partial keeps the {at} of 12 tensors that are done" in caught.value.__notes__[0]
        continued(ties())


def test_disk_full(tmp_path, nothing_is_left, monkeypatch):
    """The system's own error has no file name; people need to know which disk."""
    models(tmp_path, nothing_is_left)
    original, count = os.pwrite, 0

    def pwrite(fd, data, offset):
        nonlocal count
        count += 1
        if count == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(fd, data[: max(1, len(data) // 2)], offset)  # and writes may be short

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space left on device: .*out.partial/output/model.safetensors"):
            merge(ties(), "out")
    continued(ties())


def test_disk_full_when_flushing(tmp_path, nothing_is_left, monkeypatch):
    """Filesystems that allocate late tell at the flush, in a thread of its own: what was not recorded does not count."""
    models(tmp_path, nothing_is_left)
    original, count = writer.datasync, 0

    def datasync(fd):
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(fd)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "datasync", datasync)
        patch.setattr(writer, "MOST_OPEN", 0)  # flush after every tensor
        with pytest.raises(OSError, match="No space left on device") as caught:
            merge(ties(), "out")
    assert "keeps the 2 of 12 tensors" in caught.value.__notes__[0]
    continued(ties())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, RuntimeError, MemoryError])
@pytest.mark.parametrize("at", [1, 7])
def test_method_fails(tmp_path, nothing_is_left, monkeypatch, error, at):
    models(tmp_path, nothing_is_left)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    count = 0

    @registry.register_method("failing", base="required", summary="fails")
    def failing(base, models, *, name, dtype, out, check_finite):
        nonlocal count
        count += 1
        if count == at:
            raise error("boom")
        return base

    expected = error if error in (KeyboardInterrupt, SystemExit) else MergeError
    recipe = ties(merge_method="failing", parameters={})
    with pytest.raises(expected, match="boom|not enough memory"):
        merge(recipe, "out")
    if at > 1 and expected is error:
        continued(recipe)


def test_method_returns_the_wrong_shape(tmp_path, nothing_is_left, monkeypatch):
    models(tmp_path, nothing_is_left)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register_method("flat", base="required", summary="flat")(lambda base, models, **_: base.reshape(-1))
    with pytest.raises(MergeError, match=r"'lm_head.weight': 'flat' failed: returned shape \[640\] for tensors of shape \[40, 16\]"):
        merge(ties(merge_method="flat", parameters={}), "out")


def test_progress_that_fails(tmp_path, nothing_is_left):
    models(tmp_path, nothing_is_left)

    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(ties(), "out", progress=progress)
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)  # whether the first tensor was done is a race


def test_output_appears_meanwhile(tmp_path, nothing_is_left):
    models(tmp_path, nothing_is_left)

    def progress(done, total):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/x").write_text("x")

    with pytest.raises(FileExistsError, match="exists already"):
        merge(ties(), "out", progress=progress)
    assert tree(tmp_path / "out") == {"x": b"x"}
    shutil.rmtree(tmp_path / "out")
    continued(ties())


def test_ring(tmp_path, nothing_is_left):
    nothing_is_left["before"] = {}
    ring = Ring(640)
    assert [ring.take(n) for n in (1, 64, 300)] == [0, 64, 128]
    ring.release()
    ring.release()
    assert ring.take(100) == 448
    assert ring.take(128) == 0
    with pytest.raises(ValueError, match="ring of 640"):
        ring.take(641)
    threading.Timer(0.05, ring.stop).start()
    with pytest.raises(Stopped):
        ring.take(64)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def test_ring_with_two_threads(tmp_path, nothing_is_left):
    """Pieces never overlap and the order is kept, for sizes that wrap around at every place."""
    nothing_is_left["before"] = {}
    ring = Ring(1000)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 1001, (3000,), generator=generator).tolist()
    taken = []

    def take():
        for i, size in enumerate(sizes):
            start = ring.take(size)
            ring.view[start : start + size] = bytes([i % 251]) * size
            taken.append((i, start, size))

    thread = threading.Thread(target=take)
    thread.start()
    for i in range(len(sizes)):
        while len(taken) <= i:
            time.sleep(0)
        index, start, size = taken[i]
        assert bytes(ring.view[start : start + size]) == bytes([index % 251]) * size
        ring.release()
    thread.join()
