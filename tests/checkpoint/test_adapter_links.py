"""An adapter folder from somebody else does not make a merge read what lies outside of it."""

import os
import shutil

import pytest
import torch

import pymerge
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.lora import open_adapter
from pymerge.recipe import RecipeError

from .adapters import save_adapter
from .files import save_model

PAIR = {"m": (torch.ones(2, 4), torch.ones(3, 2))}
BOTH = pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "other", PAIR)
    save_adapter(tmp_path / "other", PAIR, pickled=True)
    save_model(tmp_path / "base", {"m.weight": torch.ones(3, 4)})
    return tmp_path


def weights(pickled):
    return "adapter_model.bin" if pickled else "adapter_model.safetensors"


@BOTH
@pytest.mark.parametrize("target", ["../other/{}", "{{}}/other/{}", "inner/../../other/{}", "chain"])
@pytest.mark.parametrize("what", ["config", "weights"])
def test_links_out_of_the_folder(work, pickled, target, what):
    """Relative, absolute, by a detour, and through another link; for what a recipe adds to a base and for what is merged."""
    save_adapter(work / "a", PAIR, pickled=pickled)
    (work / "a/inner").mkdir()
    name = "adapter_config.json" if what == "config" else weights(pickled)
    (work / "a" / name).unlink()
    (work / "a/chain").symlink_to(f"../other/{name}")
    (work / "a" / name).symlink_to(target.format(name).format(work))
    message = f"a/{name}: is a symbolic link to .*other/{name}, outside of its folder"
    with pytest.raises(CheckpointError, match=message):
        open_adapter("a")
    with pytest.raises(CheckpointError, match=message):
        pymerge.merge_adapters(["other", "a"], "out")
    with pytest.raises(RecipeError, match=message):
        pymerge.merge({"merge_method": "passthrough", "models": [{"model": "base+a"}]}, "out")
    assert not os.path.exists("out") and not os.path.exists("out.partial")


@BOTH
def test_links_that_are_fine(work, pickled):
    """Within the folder, and of the folder itself."""
    save_adapter(work / "a", PAIR, pickled=pickled)
    for name in ("adapter_config.json", weights(pickled)):
        (work / "a" / name).rename(work / "a" / f"real-{name}")
        (work / "a" / name).symlink_to(f"real-{name}")
    (work / "link").symlink_to("a")
    for path in ("a", "link"):
        with open_adapter(path) as adapter:
            assert list(adapter.modules) == ["m"]


@pytest.mark.parametrize("target", ["adapter_model.safetensors", "nowhere"])
def test_links_to_nowhere(work, target):
    save_adapter(work / "a", PAIR)
    (work / "a/adapter_model.safetensors").unlink()
    (work / "a/adapter_model.safetensors").symlink_to(target)
    with pytest.raises(CheckpointError, match="^a"):
        open_adapter("a")


def test_the_cache_of_the_hub(work):
    """Its snapshots are links into blobs/ of the same repository, and of no other."""
    snapshot, blobs = work / "hub/models--org--a/snapshots/12", work / "hub/models--org--a/blobs"
    os.makedirs(snapshot)
    blobs.mkdir()
    os.remove("other/adapter_model.bin")
    for i, path in enumerate(sorted((work / "other").iterdir())):
        path.rename(blobs / f"{i}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{i}", snapshot))
    with open_adapter(snapshot) as adapter:
        assert list(adapter.modules) == ["m"]
    elsewhere = work / "hub/models--org--b/blobs"
    os.makedirs(elsewhere)
    shutil.move(blobs / "1", elsewhere / "1")
    (snapshot / "adapter_model.safetensors").unlink()
    (snapshot / "adapter_model.safetensors").symlink_to(os.path.relpath(elsewhere / "1", snapshot))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        open_adapter(snapshot)


def test_a_private_file_is_not_published(work):
    """adapter_config.json is read into the output's."""
    (work / "private.txt").write_text('{"peft_type": "LORA", "r": 2, "key": "secret"}')
    save_adapter(work / "a", PAIR)
    (work / "a/adapter_config.json").unlink()
    (work / "a/adapter_config.json").symlink_to("../private.txt")
    with pytest.raises(CheckpointError, match="outside of its folder"):
        pymerge.merge_adapters(["a"], "out")
    assert not (work / "out").exists()
