"""Recipes whose models are models with adapters, or pickled, through plan, merge, resume's bookkeeping and verify."""

import json

import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.checkpoint.load import load_tensor
from pymerge.checkpoint.lora import AdaptedCheckpoint, open_adapter
from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.reader import open_checkpoint
from pymerge.checkpoint.verify import verify

from .adapters import save_adapter
from .files import save_model


def model(seed):
    g = torch.Generator().manual_seed(seed)
    names = ["embed.weight", "model.layers.0.w.weight", "model.layers.1.w.weight"]
    return {name: torch.randn(24, 16, generator=g).bfloat16() for name in names}


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "base", model(0))
    for i, name in enumerate("xy"):
        g = torch.Generator().manual_seed(10 + i)
        modules = {f"model.layers.{i}.w": (torch.randn(2, 16, generator=g), torch.randn(24, 2, generator=g)) for i in range(2)}
        save_adapter(tmp_path / name, modules, lora_alpha=1)
    return tmp_path


def adapted(folder, *names):
    store = open_checkpoint(folder / "base")
    for name in names:
        store = AdaptedCheckpoint(store, open_adapter(folder / name))
    return {name: load_tensor(store, info) for name, info in store.tensors.items()}


def test_adapters_on_a_base_are_models(folder, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": text, "parameters": {"weight": 0.5, "density": 0.4}} for text in ("base+x", "base+x+y")],
    }
    merge(recipe, folder / "out")
    experts = [adapted(folder, "x"), adapted(folder, "x", "y")]
    want = pymerge.ties(model(0), experts, weights=0.5, density=0.4, convention="mergekit")
    got = load_file(folder / "out" / "model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    # The output names the adapters' files too, and can be checked.
    named = json.dumps(json.loads((folder / "out" / "pymerge.json").read_text()))
    assert "adapter_model.safetensors" in named
    assert verify(folder / "out", folder=folder, sample=None).ok
    save_adapter(folder / "y", {"model.layers.0.w": (torch.randn(2, 16), torch.randn(24, 2))}, lora_alpha=1)
    assert not verify(folder / "out", folder=folder, sample=None).ok


def test_an_adapter_on_a_stretch_of_layers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "base" / "config.json").write_text('{"num_hidden_layers": 2}')
    slices = [{"sources": [{"model": "base+x", "layer_range": [1, 2]}]}, {"sources": [{"model": "base", "layer_range": [0, 2]}]}]
    merge({"merge_method": "passthrough", "slices": slices}, folder / "out")
    got = load_file(folder / "out" / "model.safetensors")
    assert torch.equal(got["model.layers.0.w.weight"], adapted(folder, "x")["model.layers.1.w.weight"])
    assert torch.equal(got["model.layers.2.w.weight"], model(0)["model.layers.1.w.weight"])


def test_pickled_and_safetensors_models_together(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "pickled").mkdir()
    torch.save(model(5), folder / "pickled" / "pytorch_model.bin")
    merge({"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1.0}} for m in ("base", "pickled")]}, folder / "out")
    want = pymerge.linear([model(0), model(5)])
    got = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert verify(folder / "out", folder=folder, sample=None).ok
