"""Files in PyTorch's own format: read exactly, never run, and refused with a reason when they are not what they seem."""

import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pymerge
from pymerge.checkpoint import pickled
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.reader import open_checkpoint

from .files import save_model, tensors_of


def raw_bytes(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def read(checkpoint, name, start=0, end=None):
    info = checkpoint.tensors[name]
    target = bytearray((info.nbytes if end is None else end) - start)
    checkpoint.read_into(info, memoryview(target), start)
    return bytes(target)


def odd_tensors():
    matrix = torch.arange(24.0).view(4, 6)
    return {
        "matrix": matrix,
        "tied": matrix,
        "transposed": matrix.t(),
        "rows": matrix[1:3],
        "columns": matrix[:, 2:5],
        "every_other": matrix[::2, ::3],
        "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
        "expanded": torch.ones(2).expand(3, 2),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "half": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "fp8": torch.ones(5).to(torch.float8_e4m3fn),
        "ids": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "large": torch.randn(1200, 700).t(),
    }


def forget_places(monkeypatch):
    """Older versions of torch do not say where storages lie in the file."""
    load = pickled._torch_load
    monkeypatch.setattr(pickled, "_torch_load", lambda file, map_location, mmap: load(file, map_location="cpu", mmap=mmap))


@pytest.fixture(params=["zip", "zip of an old torch", "legacy"])
def odd_file(request, tmp_path, monkeypatch):
    if request.param == "zip of an old torch":
        forget_places(monkeypatch)
    tensors = odd_tensors()
    if request.param == "legacy":
        del tensors["fp8"]  # which that format cannot hold
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "x.pt", _use_new_zipfile_serialization=request.param != "legacy")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        yield checkpoint, tensors


def test_any_piece_of_any_layout(odd_file):
    checkpoint, tensors = odd_file
    pick = random.Random(0)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tensor.shape
        expected = raw_bytes(tensor)
        assert read(checkpoint, name) == expected
        for _ in range(10):
            start, end = sorted((pick.randint(0, len(expected)), pick.randint(0, len(expected))))
            assert read(checkpoint, name, start, end) == expected[start:end]
    with pytest.raises(ValueError, match="were asked for"):
        read(checkpoint, "transposed", 90, 100)


def test_tied_tensors_are_known(odd_file):
    checkpoint, _ = odd_file
    assert checkpoint.aliases == {"tied": "matrix"}


@given(st.data())
def test_strided_pieces(data):
    from pymerge.checkpoint.strided import is_contiguous, read_strided

    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    itemsize = data.draw(st.sampled_from([1, 2, 4]))
    base = torch.randint(0, 256, (*shape, itemsize), dtype=torch.uint8)
    order = data.draw(st.permutations(range(len(shape))))
    x = base.permute(*order, len(shape))
    for i in range(len(shape)):
        x = x.narrow(i, 0, data.draw(st.integers(1, x.shape[i])))
    strides = [stride // itemsize for stride in x.stride()[:-1]]
    expected = bytes(x.contiguous().view(-1).tolist())
    start = data.draw(st.integers(0, len(expected)))
    target = bytearray(data.draw(st.integers(0, len(expected) - start)))
    storage = bytes(base.view(-1).tolist())

    def read(position, piece):
        assert position + len(piece) <= len(storage)
        piece[:] = storage[position : position + len(piece)]

    from pymerge.checkpoint import strided

    strided.SMALLEST_SPAN, before = data.draw(st.sampled_from([1, strided.SMALLEST_SPAN])), strided.SMALLEST_SPAN
    try:
        read_strided(read, x.shape[:-1], strides, 0, itemsize, start, memoryview(target))
    finally:
        strided.SMALLEST_SPAN = before
    assert bytes(target) == expected[start : start + len(target)]
    assert is_contiguous(x.shape[:-1], strides) == x.is_contiguous()


def save_pickled(folder, tensors, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    torch.save({}, folder / "training_args.bin")
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_merges_as_safetensors_do(tmp_path, shards):
    models = [tensors_of(seed) for seed in range(3)]
    for i, tensors in enumerate(models):
        save_model(tmp_path / f"s{i}", tensors)
        save_pickled(tmp_path / f"p{i}", tensors, shards)
    recipe = {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.5}}
    for kind in "sp":
        models = [{"model": str(tmp_path / f"{kind}{i}")} for i in (1, 2)]
        pymerge.merge({**recipe, "base_model": str(tmp_path / f"{kind}0"), "models": models}, tmp_path / f"{kind}.safetensors")
    with open_checkpoint(tmp_path / "s.safetensors") as expected, open_checkpoint(tmp_path / "p.safetensors") as got:
        assert set(expected.tensors) == set(got.tensors)
        assert all(read(got, name) == read(expected, name) for name in expected.tensors)


def test_safetensors_are_preferred(tmp_path):
    folder = save_model(tmp_path / "m", {"w": torch.ones(2)})
    torch.save({"w": torch.zeros(2)}, folder / "pytorch_model.bin")
    assert read(open_checkpoint(folder), "w") == raw_bytes(torch.ones(2))
    assert read(open_checkpoint(folder / "pytorch_model.bin"), "w") == raw_bytes(torch.zeros(2))
    assert open_checkpoint(folder / "pytorch_model.bin").folder == folder


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="x.bin: holds more than tensors.*mkdir.*save its weights alone"):
            open_checkpoint(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "y.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list; a mapping"),
        ({}, "holds no tensors by name"),
        ({"a": {"b": {"w": torch.ones(2)}}}, "holds no tensors by name"),
        ({"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}}, "under each of 'model', 'ema'"),
        ({"w": torch.ones(1), "inner": {"w": torch.ones(1)}}, "entry 'inner' is not a tensor with a name"),
        ({"w": torch.ones(1), 3: torch.ones(1)}, "entry 3 is not a tensor with a name"),
        ({"w": torch.eye(3).to_sparse()}, "tensor 'w': is a sparse_coo tensor"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "tensor 'w': dtype torch.complex128"),
        ({"w": torch.ones(1).expand(10**9)}, "is larger than the whole file"),
        ({"\ud800": torch.ones(1)}, "is not Unicode text"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "lazy conjugate"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pth")


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match="TorchScript archive, which is a program"):
        open_checkpoint(tmp_path / "x.pt")


def test_compressed_records_are_refused(tmp_path):
    """A zip bomb, or data whose place in the file is not where it is read."""
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        open_checkpoint(tmp_path / "y.pt")


def test_views_beyond_their_storage_are_refused(tmp_path):
    """The pickle says 1000 elements, the record has 10: without a check this would read other data of the file."""
    torch.save({"w": torch.zeros(10), "big": torch.zeros(3000)}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    tuple_of_one = pickle.BININT1 + b"\x0a" + pickle.TUPLE1
    assert content.count(tuple_of_one) == 1
    (tmp_path / "x.pt").write_bytes(content.replace(tuple_of_one, pickle.BININT1 + b"\xff" + pickle.TUPLE1))
    with pytest.raises(CheckpointError, match="'w' does not lie inside the data"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_end_in_an_error(tmp_path, zipped):
    """Cut or flipped anywhere: an error that names the file, or a checkpoint whose tensors can be read."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(40.0).view(8, 5), "t": torch.arange(6.0).view(2, 3).t()}, path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    pick = random.Random(1)
    cuts = [good[: pick.randrange(len(good))] for _ in range(40)]
    flips = []
    for _ in range(150):
        changed = bytearray(good)
        changed[pick.randrange(len(good))] ^= 1 << pick.randrange(8)
        flips.append(bytes(changed))
    errors = 0
    for content in [*cuts, *flips]:
        path.write_bytes(content)
        try:
            with open_checkpoint(path) as checkpoint:
                for name, info in checkpoint.tensors.items():
                    assert info.nbytes <= len(content)
                    read(checkpoint, name)
        except CheckpointError as error:
            assert str(path) in str(error)
            errors += 1
    assert errors >= len(cuts)


@pytest.mark.parametrize("zipped", [True, False])
def test_changed_after_opening(tmp_path, zipped):
    """Nothing is mapped, so a file that is cut short ends in an error, not in SIGBUS."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.randn(100, 100), "t": torch.randn(50, 60).t()}, path, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(path)
    if zipped:
        read(checkpoint, "w"), read(checkpoint, "t")
        os.truncate(path, 1000)
        for name in "wt":
            with pytest.raises(CheckpointError, match="truncated after it was opened"):
                read(checkpoint, name)
    checkpoint = open_checkpoint_of_other(path, checkpoint)
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        read(checkpoint, "w")


def open_checkpoint_of_other(path, checkpoint):
    checkpoint.close()
    torch.save({"w": torch.zeros(100, 100)}, path)
    return checkpoint


def test_planning_reads_no_data(tmp_path, monkeypatch):
    """A file of 1 GB with a hole for its data: opening it must not touch the hole's pages."""
    import resource

    with torch.serialization.skip_data():
        torch.save({f"w{i}": torch.empty(2**26) for i in range(4)}, tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert checkpoint.nbytes == 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
