"""Merging files on a device: the CPU's bytes, bounded memory there, and errors that say what to do.

Without a GPU the device is made of the CPU's memory, with streams that do nothing before somebody waits for them, and memory that is
overwritten as soon as it is given back: what is not waited for, or given back too early, shows as wrong bytes.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pymerge
from pymerge import merge
from pymerge.checkpoint import budget, device, memory
from pymerge.checkpoint.failures import DeviceError, MergeError
from pymerge.checkpoint.ring import Ring
from pymerge.merge_methods import registry
from tests.cli.test_commands import run
from tests.fake_streams import Device

from .files import save_model, tree
from .test_merge import recipe_of

WEIGHTED = {"weight": 1, "density": 0.3}
METHODS = {
    "breadcrumbs": {**WEIGHTED, "gamma": 0.1},
    "breadcrumbs_ties": {**WEIGHTED, "gamma": 0.1},
    "dare_linear": {**WEIGHTED, "seed": 3},
    "dare_ties": {**WEIGHTED, "seed": 3, "convention": "default"},
    "della": {**WEIGHTED, "seed": 3},
    "della_linear": {**WEIGHTED, "seed": 3, "convention": "default"},
    "karcher": {},
    "linear": {"weight": 1},
    "magmax": {},
    "model_soup": {},
    "model_stock": {},
    "multislerp": {"weight": 1},
    "nearswap": {"t": 0.1},
    "nuslerp": {"weight": 1},
    "passthrough": {},
    "ram": {},
    "ramplus_tl": {},
    "sce": {"select_topk": 0.4},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": 0.5},
    "ties": WEIGHTED,
    "wise_ft": {"alpha": 0.3},
}


def tensors(seed, size=(130, 90)):
    """One tensor is of more than a slice, when slices are short, and some are of less; integers too."""
    common, own = (torch.Generator().manual_seed(i) for i in (1, 100 + seed))
    shapes = {"b.weight": size, "a.weight": (30, 333), "norm": (64,), "empty": (0, 3)}
    found = {n: (torch.randn(s, generator=common) + torch.randn(s, generator=own) / 8).bfloat16() for n, s in shapes.items()}
    return {**found, "half": found["norm"].half(), "ids": torch.arange(9000)}


def save_models(size=(130, 90)):
    for i, name in enumerate(("base", "m1", "m2", "m3")):
        shutil.rmtree(name, ignore_errors=True)
        save_model(Path(name), tensors(i, size), shards=1 + i)


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_models()


@pytest.fixture
def pretend(monkeypatch):
    """A device "cuda", and little memory; gives what was allocated there."""
    allocated = []

    class Counted(Device):
        def __init__(self):
            super().__init__(None)
            for stream in self.streams:
                plain = stream.allocate
                stream.allocate = lambda size, where, plain=plain: allocated.append(size) or plain(size, where)

    release = Ring.release

    def poisoned(ring):
        first, last = ring._pieces[0]
        ring.memory[first:last] = 255
        release(ring)

    monkeypatch.setattr(Ring, "release", poisoned)
    monkeypatch.setattr(device, "usable", lambda name: torch.device("cpu"))
    monkeypatch.setattr(device, "make_streams", lambda where: tuple(Counted().streams))
    monkeypatch.setattr(memory, "LEAST_MEMORY", 1)
    monkeypatch.setattr(memory, "BATCH", 20_000)
    return allocated


def recipe(method, **parameters):
    known = registry.get_method(method)
    count = 2 if method == "nuslerp" else min(3, known.max_models)
    base = None if known.base == "model" else "base"
    return recipe_of(method, count, base, parameters={**METHODS[method], **parameters})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_bytes(method, pretend):
    merge(recipe(method), "cpu", memory="1GB")
    merge(recipe(method), "whole", memory="1GB", device="cuda")
    merge(recipe(method), "slices", memory="1GB", device="cuda", device_memory=100_000)
    assert tree(Path("whole")) == tree(Path("slices")) == tree(Path("cpu"))


def test_every_method_is_either_merged_on_a_device_or_refused(pretend):
    refused = {name for name in pymerge.methods() if registry.get_method(name).cpu_only}
    assert refused | set(METHODS) == set(pymerge.methods()) and refused == {"arcee_fusion"}
    with pytest.raises(MergeError, match=r"^'arcee_fusion' is merged on the CPU only: its exponentials .* leave --device \(device=\) out"):
        merge(recipe_of("arcee_fusion", 1), "out", device="cuda")
    adapters = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    for name in "ab":
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text("{}")
    with pytest.raises(MergeError, match="adapters are merged with each other on the CPU only"):
        merge(adapters, "out", device="cuda")
    assert not Path("out").exists() and not Path("out.partial").exists()


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
@pytest.mark.parametrize("budget", [60_000, "1GB"])
def test_ranks_and_slices_by_the_torch_selection(convention, budget, pretend, monkeypatch):
    """The selection that a GPU uses, here on the other backend's slices."""
    from pymerge import native, streamed_selection

    merge(recipe("ties", convention=convention), "cpu", memory="1GB")
    monkeypatch.setattr(native, "StreamedSelection", streamed_selection.StreamedSelection)
    merge(recipe("ties", convention=convention), "out", device="cuda", device_memory=budget)
    assert tree(Path("out")) == tree(Path("cpu"))


@pytest.mark.parametrize("stream", [0, 1, 2], ids=["copies in", "kernels", "copies out"])
def test_a_wait_that_is_forgotten_shows(stream, pretend, monkeypatch):
    merge(recipe("linear"), "cpu")
    plain = device.make_streams

    def careless(where):
        made = plain(where)
        made[stream].synchronize = lambda: None
        return made

    monkeypatch.setattr(device, "make_streams", careless)
    try:
        merge(recipe("linear"), "out", device="cuda", check_finite=False)
    except (RuntimeError, ValueError):
        return
    assert tree(Path("out")) != tree(Path("cpu"))


@pytest.mark.parametrize("size", [250_000, 500_000, 10**6])
def test_rings_on_the_device_keep_within_its_budget(size, pretend):
    merge(recipe("ties"), "out", device="cuda", device_memory=size, memory="1GB")
    assert len(pretend) == 2 and sum(pretend) <= size


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', and torch sees no GPU here"):
        merge(recipe("ties"), "out", device="cuda")
    with pytest.raises(ValueError, match="device is 'gpu'; choose a GPU"):
        merge(recipe("ties"), "out", device="gpu")
    with pytest.raises(ValueError, match="name one"):
        merge(recipe("ties"), "out", device_memory="1GB")
    Path("r.json").write_text(json.dumps(recipe("ties")))
    for command in (["merge", "r.json", "out"], ["plan", "r.json"]):
        done = run(*command, "--device", "cuda:1", cwd=".")
        assert done.returncode == 2 and "device is 'cuda:1', and torch sees no GPU here" in done.stderr
    merge(recipe("ties"), "made")
    done = run("verify", "made", "--device", "cuda", cwd=".")
    assert done.returncode == 2 and "torch sees no GPU here" in done.stderr
    assert not Path("out").exists() and not Path("out.partial").exists()


def test_budgets_that_the_device_does_not_have(pretend, monkeypatch):
    monkeypatch.setattr(device, "free_bytes", lambda where: 10**6)
    assert device.choose_device("cuda", None, 10**9).memory == 900_000
    assert device.choose_device("cuda", None, 10**5).memory == 10**5
    with pytest.raises(ValueError, match="device_memory is 2 MB, and 1 MB are free on cpu"):
        merge(recipe("ties"), "out", device="cuda", device_memory="2MB")
    monkeypatch.setattr(memory, "LEAST_MEMORY", budget.LEAST_MEMORY)
    with pytest.raises(MergeError, match="a device memory budget of 900 kB is too small"):
        merge(recipe("ties"), "out", device="cuda")


def refuse(size, where):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_no_memory_for_the_rings(pretend, monkeypatch):
    def streams(where):
        made = Device(None).streams
        for stream in made:
            stream.allocate = refuse
        return tuple(made)

    monkeypatch.setattr(device, "make_streams", streams)
    with pytest.raises(DeviceError, match=r"for tensors on their way: there is not enough memory on cpu; .*--device-memory"):
        merge(recipe("ties"), "out", device="cuda")
    assert not Path("out").exists()


@pytest.mark.parametrize("convention", ["mergekit", "paper"])
def test_a_device_that_gives_up_loses_nothing(convention, pretend, monkeypatch):
    """Memory that is not enough for one tensor, and a copy that fails: what was done goes on on the CPU, and is verified on the device."""
    made = recipe("ties", convention=convention)
    merge(made, "want", memory="1GB")
    with monkeypatch.context() as patch:
        plain = pymerge.ops._backend_for(torch.device("cpu")).merge

        def merge_or_not(base, models, spec, out, *, name="", **more):
            if name == "norm":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(base, models, spec, out, name=name, **more)

        patch.setattr(pymerge.native, "merge", merge_or_not)
        with pytest.raises(DeviceError, match=r"^'norm': .* of it are there, and 'ties' needs memory besides: .* on cpu; give a") as error:
            merge(made, "out", device="cuda", device_memory=60_000)
    assert "--resume" in error.value.__notes__[0]
    with monkeypatch.context() as patch:

        def download(self, to, source):
            with device.device_errors(self.device, "copying results from it"):
                raise RuntimeError("CUDA error: unspecified launch failure")

        patch.setattr(device.Route, "download", download)
        with pytest.raises(DeviceError, match="^copying results from it: cpu failed: CUDA error"):
            merge(made, "out", device="cuda", resume=True)
    report = merge(made, "out", resume=True)
    assert 0 < report.resumed < report.tensors and tree(Path("out")) == tree(Path("want"))
    assert pymerge.verify("out", sample=None, device="cuda").ok


def test_begun_on_the_cpu_and_continued_on_a_device(pretend, monkeypatch):
    from pymerge.checkpoint.writer import CheckpointWriter

    merge(recipe("dare_ties"), "want")
    original, count = CheckpointWriter.write, 0

    def write(self, name, data, start=0):
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(28, "No space left on device")
        original(self, name, data, start)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(CheckpointWriter, "write", write)
        merge(recipe("dare_ties"), "out", memory=60_000)
    report = merge(recipe("dare_ties"), "out", device="cuda", resume=True)
    assert 0 < report.resumed < report.tensors and tree(Path("out")) == tree(Path("want"))


def test_values_are_checked_on_the_device(tmp_path, pretend):
    broken = tensors(2)
    broken["b.weight"][100, 3] = float("nan")
    save_file(broken, tmp_path / "broken.safetensors")
    made = {**recipe("ties"), "models": [{"model": "m1"}, {"model": "broken.safetensors"}]}
    for size in (60_000, "1GB"):
        with pytest.raises(pymerge.NonFiniteError, match=r"broken.safetensors: 'b.weight' has .* nan at index \[100, 3\]"):
            merge(made, "out", device="cuda", device_memory=size)
    with pytest.raises(MergeError, match="'a.weight': the merged values overflow float16"):
        merge({**recipe("linear", weight=1e5, normalize=False), "out_dtype": "float16"}, "out", device="cuda")
    save_file({**broken, "ids": torch.arange(9000) + 1}, tmp_path / "broken.safetensors")
    with pytest.raises(MergeError, match="'ids' is of dtype I64, which cannot be merged"):
        merge(made, "out", device="cuda", check_finite=False)
    assert not Path("out").exists() and not Path("out.partial").exists()


def test_what_plan_and_merge_say(pretend):
    Path("r.json").write_text(json.dumps(recipe("ties")))
    options = ["--device", "cuda", "--memory", "1GB", "--device-memory", "500kB"]
    done = run("plan", "r.json", *options, cwd=".")
    assert "device   cpu, by native: at most 500 kB, of which " in done.stdout
    [document] = json.loads(run("plan", "r.json", *options, "--json", cwd=".").stdout)["merges"]
    assert document["device"] == {"name": "cpu", "backend": "native", "memory_bytes": 500_000}
    done = run("merge", "r.json", "out", "-v", *options, cwd=".")
    assert "merged by ties on cpu in" in done.stdout
    for stage in ("reading", "uploading", "merging", "downloading", "writing"):
        assert f"  {stage}  " in done.stdout
    [content] = json.loads(run("merge", "r.json", "again", "--json", *options, cwd=".").stdout)["merges"]
    assert content["device"]["memory_bytes"] == 500_000
    assert content["stages"]["uploading"]["bytes"] >= content["bytes_read"]
    assert content["stages"]["downloading"]["bytes"] >= content["bytes_written"]
    done = run("verify", "out", "--all", "--device", "cuda", cwd=".")
    assert done.returncode == 0 and "all the same" in done.stdout


@pytest.mark.parametrize(
    "method", ["linear", "dare_ties", "wise_ft", *(pytest.param(m, marks=pytest.mark.slow) for m in ("breadcrumbs", "sce", "slerp"))]
)
def test_by_the_triton_kernels(method, pretend):
    pytest.importorskip("triton")
    save_models((30, 200))
    merge(recipe(method), "cpu", memory="1GB")
    with pymerge.backend("triton"):
        merge(recipe(method), "out", device="cuda", device_memory=60_000, memory="1GB")
    assert tree(Path("out")) == tree(Path("cpu"))


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
@pytest.mark.parametrize("size", [60_000, pytest.param("1GB", marks=pytest.mark.slow)])
def test_ties_by_the_triton_kernels(convention, size, pretend):
    pytest.importorskip("triton")
    save_models((30, 200))
    made = recipe("ties", convention=convention)
    merge(made, "cpu", memory="1GB")
    with pymerge.backend("triton"):
        merge(made, "out", device="cuda", device_memory=size, memory="1GB")
    assert tree(Path("out")) == tree(Path("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method):
    save_models((3000, 9001))
    merge(recipe(method), "cpu")
    for size in ("64MiB", None):
        merge(recipe(method), "out", device="cuda", device_memory=size, force=True)
        assert tree(Path("out")) == tree(Path("cpu"))
