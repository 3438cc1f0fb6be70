"""A model folder from somebody else does not make a merge read or copy what lies outside of it."""

import os
import shutil

import pytest

from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.reader import open_checkpoint
from pymerge.recipe import RecipeError

from .files import save_model, tensors_of

RECIPE = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "a", tensors_of(0), 2)
    save_model(tmp_path / "b", tensors_of(1))
    (tmp_path / "private.txt").write_text("a key")
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_private_file_is_not_published(work, name):
    (work / "a" / name).unlink()
    (work / "a" / name).symlink_to("../private.txt")
    with pytest.raises((CheckpointError, RecipeError), match=f"a/{name}: is a symbolic link to .*private.txt, outside of its folder"):
        merge(RECIPE, "out")
    assert not (work / "out").exists() and not (work / "out.partial").exists()


@pytest.mark.parametrize("target", ["../b/model.safetensors", "{}/b/model.safetensors"])
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_weights_elsewhere_are_not_read(work, name, target):
    (work / "a" / name).unlink()
    (work / "a" / name).symlink_to(target.format(work))
    with pytest.raises(CheckpointError, match=f"a/{name}: is a symbolic link to .*outside of its folder"):
        open_checkpoint("a")


def test_links_that_are_fine(work):
    """Within the folder, of the folder itself, and a file that is named by its own path."""
    shard = work / "a/model-00001-of-00002.safetensors"
    shard.rename(work / "a/data")
    shard.symlink_to("data")
    (work / "link").symlink_to("a")
    (work / "one.safetensors").symlink_to("b/model.safetensors")
    for path in ("a", "link", "one.safetensors", "a/model.safetensors.index.json"):
        assert len(open_checkpoint(path).tensors) == 12


def test_a_link_to_itself(work):
    shard = work / "a/model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(CheckpointError, match="00001-of-00002.safetensors"):
        open_checkpoint("a")


@pytest.mark.parametrize("below", ["", "sub"])
def test_the_cache_of_the_hub(work, below):
    """Its snapshots are links into blobs/ of the same model, and of no other."""
    snapshot, blobs = work / "hub/models--org--a/snapshots/1234" / below, work / "hub/models--org--a/blobs"
    os.makedirs(snapshot)
    blobs.mkdir()
    for i, path in enumerate(sorted((work / "a").iterdir())):
        path.rename(blobs / f"{i}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{i}", snapshot))
    assert len(open_checkpoint(snapshot).tensors) == 12
    other = work / "hub/models--org--other/blobs"
    os.makedirs(other)
    shutil.move(blobs / "1", other / "1")
    link = sorted(snapshot.iterdir())[1]
    link.unlink()
    link.symlink_to(os.path.relpath(other / "1", snapshot))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        open_checkpoint(snapshot)
