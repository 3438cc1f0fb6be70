"""Opening and reading checkpoints: what a path may name, what an index may say, files that change underneath."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint import reader
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.reader import open_checkpoint

from .files import raw, save_model, tensors_of


def read(checkpoint, name):
    info = checkpoint.tensors[name]
    target = bytearray(info.nbytes)
    checkpoint.read_into(info, memoryview(target))
    return torch.frombuffer(target, dtype=torch.float32).view(info.shape)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_folder(tmp_path, shards):
    tensors = tensors_of(0)
    with open_checkpoint(save_model(tmp_path / "m", tensors, shards)) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert len(checkpoint.headers) == shards
        assert checkpoint.folder == tmp_path / "m"
        for name, tensor in tensors.items():
            assert torch.equal(read(checkpoint, name), tensor)


def test_file_and_index_paths(tmp_path):
    folder = save_model(tmp_path / "m", tensors_of(0), 2)
    assert len(open_checkpoint(folder / "model.safetensors.index.json").tensors) == 12
    assert len(open_checkpoint(folder / "model-00001-of-00002.safetensors").tensors) == 6
    assert open_checkpoint(folder / "model-00001-of-00002.safetensors").folder is None
    whole = save_model(tmp_path / "w", tensors_of(0))
    assert open_checkpoint(whole / "model.safetensors").folder == whole


def test_part_of_a_tensor(tmp_path):
    checkpoint = open_checkpoint(save_model(tmp_path / "m", {"w": torch.arange(8.0)}))
    target = bytearray(8)
    checkpoint.read_into(checkpoint.tensors["w"], memoryview(target), 12)
    assert torch.frombuffer(target, dtype=torch.float32).tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="32 bytes; 8 from byte 28"):
        checkpoint.read_into(checkpoint.tensors["w"], memoryview(target), 28)


def test_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_FILES", 2)
    with open_checkpoint(save_model(tmp_path / "m", tensors_of(0), 6)) as checkpoint:
        for name in list(checkpoint.tensors) * 2:
            read(checkpoint, name)
            assert len(checkpoint._open) <= 2


def test_shards_may_be_symlinks(tmp_path):
    """The Hugging Face cache stores every file as a link to a blob."""
    repository = tmp_path / "models--org--a"
    folder = save_model(repository / "blobs", tensors_of(0), 2)
    snapshot = repository / "snapshots/1234"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert len(open_checkpoint(snapshot).tensors) == 12


OUTSIDE = ["../m2/model.safetensors", "/etc/x.safetensors", "..", "a/b.safetensors", "a\\b", "", "x.bin", "x\n.safetensors", "C:x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_index_points_outside(tmp_path, name):
    folder = save_model(tmp_path / "m", tensors_of(0), 2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="points outside|is not the name of") as caught:
        open_checkpoint(folder)
    assert str(index) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "no 'weight_map'"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ('{"weight_map": {"a": 1}}', "not a file name"),
        ('{"weight_map": {"a": "x.safetensors"}}', "1 of 1 shards are missing, the first: x.safetensors"),
        ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "'a' occurs twice"),
    ],
)
def test_malformed_index(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_index_and_shards_disagree(tmp_path):
    folder = save_model(tmp_path / "m", tensors_of(0), 2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]

    def rewrite(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    rewrite({**good, "ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="'ghost' is in model-00001-of-00002.safetensors, which does not have it"):
        open_checkpoint(folder)
    rewrite({name: file for name, file in good.items() if name != "lm_head.weight"})
    with pytest.raises(CheckpointError, match="does not list 'lm_head.weight'"):
        open_checkpoint(folder)
    second = ["lm_head.weight", *(name for name, file in good.items() if "00002" in file)]
    save_file({name: torch.ones(1) for name in second}, folder / "model-00002-of-00002.safetensors")
    rewrite(good)
    with pytest.raises(CheckpointError, match="holds it too"):
        open_checkpoint(folder)


def test_ambiguous_or_missing(tmp_path):
    def refused(path, message):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)

    refused(tmp_path / "none", "does not exist")
    refused("a\0b", "cannot be opened|does not exist")
    refused("x" * 5000, "too long|cannot be opened")
    (tmp_path / "text.txt").write_text("x")
    refused(tmp_path / "text.txt", "neither a .safetensors, .bin, .pt or .pth file nor a folder")
    refused(tmp_path, "holds no model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin: is truncated, damaged or not a PyTorch file")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "adapter_model.safetensors").write_bytes(raw({}))
    refused(tmp_path, "LoRA adapter")
    folder = save_model(tmp_path / "m", tensors_of(0), 2)
    (folder / "model.safetensors").write_bytes(raw({}))
    refused(folder, "holds both")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "holds 2 .safetensors files, but neither")


def test_truncated_after_opening(tmp_path):
    """A memory map would end in SIGBUS here."""
    path = save_model(tmp_path / "m", tensors_of(0)) / "model.safetensors"
    checkpoint = open_checkpoint(path)
    last = list(checkpoint.tensors)[-1]
    read(checkpoint, last)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match="truncated after it was opened"):
        read(checkpoint, last)


def test_replaced_after_opening(tmp_path):
    folder = save_model(tmp_path / "m", tensors_of(0))
    checkpoint = open_checkpoint(folder)
    save_model(folder, tensors_of(1))
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        read(checkpoint, "lm_head.weight")
