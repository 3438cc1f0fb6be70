"""Output files: readable by safetensors, aligned, complete or absent."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pymerge.checkpoint import partial
from pymerge.checkpoint.layout import OutputTensor, make_layout
from pymerge.checkpoint.reader import open_checkpoint
from pymerge.checkpoint.sizes import format_bytes, parse_bytes
from pymerge.checkpoint.target import check_target
from pymerge.checkpoint.writer import CheckpointWriter

from .files import tree

TENSORS = {
    "a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(3.0, dtype=torch.float64),
    "d": torch.empty(0, 4), "e": torch.tensor([True, False, True]), "ü": torch.arange(3),
}  # fmt: skip
CODES = {"a": "F32", "b": "BF16", "c": "F64", "d": "F32", "e": "BOOL", "ü": "I64"}
OUTPUTS = [OutputTensor(name, CODES[name], tuple(t.shape)) for name, t in TENSORS.items()]


def data(t):
    return memoryview(bytes(t.reshape(-1).view(torch.uint8).tolist()) if t.numel() else b"")


def write(out, layout, **options):
    with CheckpointWriter(out, layout, **options) as writer:
        for name in reversed(TENSORS):
            writer.write(name, data(TENSORS[name]))
        writer.commit()


def test_single_file(tmp_path):
    write(tmp_path / "out", make_layout(OUTPUTS, 10**9, {"format": "pt", "k": "v"}))
    assert sorted(tree(tmp_path)) == ["out/model.safetensors"]
    path = tmp_path / "out/model.safetensors"
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt", "k": "v"}
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in TENSORS.items())
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.headers[0].data_start % 64 == 0
    for info in checkpoint.tensors.values():
        assert info.offset % TENSORS[info.name].element_size() == 0


@pytest.mark.parametrize("size", [1, 20, 24, 30, 60])
def test_shards(tmp_path, size):
    layout = make_layout(OUTPUTS, size, {"format": "pt"})
    write(tmp_path / "out", layout)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    count = len(layout.shards)
    assert [s.file_name for s in layout.shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for shard in layout.shards:
        held = sum(TENSORS[name].nbytes for name in shard.offsets)
        assert held <= size or sum(TENSORS[name].nbytes > 0 for name in shard.offsets) == 1
        loaded = load_file(tmp_path / "out" / shard.file_name)
        assert all(torch.equal(loaded[name], TENSORS[name]) for name in shard.offsets)
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(TENSORS)


def test_file_target(tmp_path):
    out = tmp_path / "new" / "x.safetensors"
    write(out, make_layout(OUTPUTS, 1, {}, out.name))
    assert list(tree(tmp_path)) == ["new/x.safetensors"]
    assert torch.equal(load_file(out)["a"], TENSORS["a"])


def test_nothing_left_after_an_error(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            with CheckpointWriter(tmp_path / "deep/er/out", make_layout(OUTPUTS, 20, {})) as writer:
                writer.write("a", data(TENSORS["a"]))
                assert [p.name for p in (tmp_path / "deep/er").iterdir()] == ["out.partial"]
                raise error
        assert list(tmp_path.iterdir()) == []


def test_commit_of_an_incomplete_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="5 tensors were not written, the first"):
        with CheckpointWriter(tmp_path / "out", make_layout(OUTPUTS, 10**9, {})) as writer:
            writer.write("a", data(TENSORS["a"]))
            writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tmp_path):
    layout = make_layout(OUTPUTS, 10**9, {})
    out = tmp_path / "out"
    write(out, layout)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        write(out, layout)
    with pytest.raises(KeyError):
        with CheckpointWriter(out, layout, force=True) as writer:
            assert tree(tmp_path).items() >= before.items()
            writer.write("missing", memoryview(b""))
    assert tree(tmp_path) == before
    write(out, make_layout(OUTPUTS, 20, {}), force=True)
    assert "model.safetensors" not in os.listdir(out)
    assert os.listdir(tmp_path) == ["out"]


def test_empty_folder_is_a_free_name(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", make_layout(OUTPUTS, 10**9, {}))
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two renames"])
def test_replacing(tmp_path, monkeypatch, swaps):
    """With the system's exchange of two names, there is a checkpoint under the name at every moment; else it comes back after an error."""
    out = tmp_path / "out"
    write(out, make_layout(OUTPUTS, 10**9, {}))
    before = tree(tmp_path)
    if not swaps:
        monkeypatch.setattr(partial, "exchange", lambda a, b: False)
    rename = os.rename

    def failing(a, b):
        assert not swaps
        if "output" in str(a):
            raise OSError("no")
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        if swaps:
            write(out, make_layout(OUTPUTS, 20, {}), force=True)
        else:
            with pytest.raises(OSError, match="no"):
                write(out, make_layout(OUTPUTS, 20, {}), force=True)
            assert tree(tmp_path) == before
            patch.undo()
            write(out, make_layout(OUTPUTS, 20, {}), force=True)
    assert "model.safetensors" not in os.listdir(out)
    assert os.listdir(tmp_path) == ["out"]


def test_a_dead_process_without_a_description_is_no_obstacle(tmp_path):
    layout = make_layout(OUTPUTS, 10**9, {})
    dead = CheckpointWriter(tmp_path / "out", layout)
    dead.__enter__()
    dead.write("a", memoryview(bytes(24)))
    dead.keep()
    dead.__exit__(None, None, None)
    assert os.listdir(tmp_path) == ["out.partial"]
    write(tmp_path / "out", layout)
    assert os.listdir(tmp_path) == ["out"]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["a"], TENSORS["a"])


def test_slices(tmp_path):
    """A tensor may come in pieces, from several threads, in any order; it is done when all of it is there."""
    layout = make_layout(OUTPUTS, 10**9, {})
    with CheckpointWriter(tmp_path / "out", layout) as writer:
        whole = data(TENSORS["a"])
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda i: writer.write("a", whole[i : i + 5], i), (20, 5, 15, 0)))
        writer.sync()
        assert "a" not in writer.done
        with pytest.raises(ValueError, match="'a' has 24 bytes; 5 were to be written from byte 20 on"):
            writer.write("a", whole[:5], 20)
        writer.write("a", whole[10:15], 10)
        writer.sync()
        assert writer.done == {"a"}
        for name in set(TENSORS) - {"a"}:
            writer.write(name, data(TENSORS[name]))
        writer.commit()
    loaded = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(loaded[name], t) for name, t in TENSORS.items())


def test_targets(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "home/sub").mkdir(parents=True)
    (tmp_path / "home/x.safetensors").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("x")
    (tmp_path / "d.safetensors").mkdir()
    (tmp_path / "f.safetensors").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    assert check_target(tmp_path / "new/deep", False) is None
    assert "symbolic link" in check_target(tmp_path / "link", True)
    assert "not a folder" in check_target(tmp_path / "file", True)
    assert "is not a folder" in check_target(tmp_path / "file/out", False)
    assert "delete it yourself" in check_target(tmp_path / "home", True)
    assert "delete it yourself" in check_target(tmp_path / "notes", True)
    assert "exists already" in check_target(tmp_path / "notes", False)
    assert "is not a file" in check_target(tmp_path / "d.safetensors", True)
    assert "exists already" in check_target(tmp_path / "f.safetensors", False)
    assert check_target(tmp_path / "f.safetensors", True) is None


def test_sizes():
    assert [parse_bytes(x) for x in ("5GB", 7, "1KiB", "1.5 M", "2e3", "5B")] == [5 * 10**9, 7, 1024, 1_500_000, 2000, 5]
    for wrong in ("", "GB", "-1", "5 XB", "0", "nan", True):
        with pytest.raises(ValueError, match="size|less than a byte"):
            parse_bytes(wrong)
    assert [format_bytes(x) for x in (0, 999, 1234, 999_600, 10**15)] == ["0 B", "999 B", "1.23 kB", "1 MB", "1000 TB"]
