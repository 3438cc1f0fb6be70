"""Files with several recipes: each is merged after what it uses, once."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.format import read_header
from pymerge.checkpoint.many import plan_merges
from pymerge.checkpoint.merge import merge
from pymerge.recipe import RecipeError

from .files import save_model, tensors_of, tree

MANY = """\
merge_method: linear
models: [{model: stage}, {model: c}]
parameters: {weight: 1.0}
---
name: stage
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1.0}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        save_model(tmp_path / name, tensors_of(seed))
    Path("many.yml").write_text(MANY)
    return tmp_path


def planned(**options):
    found = []
    for place, plan in plan_merges("many.yml", "out", **options):
        found.append((place.name, plan is not None))
        if plan is not None:
            plan.close()
            break
    return found


def test_merged_in_order():
    report = merge("many.yml", "out")
    assert report.out == Path("out/merged").absolute() and set(tree(Path("out"))) >= {"stage/config.json", "merged/README.md"}
    a, b, c = (tensors_of(i)["lm_head.weight"] for i in range(3))
    torch.testing.assert_close(load_file("out/merged/model.safetensors")["lm_head.weight"], ((a + b) / 2 + c) / 2)


def test_the_same_bytes_wherever_they_go():
    merge("many.yml", "out")
    merge("many.yml", "elsewhere/deep")
    assert Path("out/merged/model.safetensors").read_bytes() == Path("elsewhere/deep/merged/model.safetensors").read_bytes()
    assert "stage" in read_header(Path("out/merged/model.safetensors")).metadata["pymerge_recipe"]


def test_what_is_there_is_not_merged_again():
    merge("many.yml", "out")
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.safetensors")}
    assert [plan is not None for _, plan in plan_merges("many.yml", "out")] == [False, False]
    merge("many.yml", "out")
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.safetensors")} == before
    assert planned(force=True) == [("stage", True)]
    shutil.rmtree("out/stage")
    assert planned() == [("stage", True)]


def test_another_recipes_result_is_not_taken():
    merge("many.yml", "out")
    Path("many.yml").write_text(MANY.replace("{model: c}", "{model: a}"))
    with pytest.raises(RecipeError, match="exists already"):
        merge("many.yml", "out")
    merge("many.yml", "out", force=True)


def test_everything_that_can_be_is_planned_first():
    Path("many.yml").write_text(MANY + "---\nname: third\nmerge_method: linear\nmodels: [{model: nowhere}]\nparameters: {weight: 1}\n")
    with pytest.raises(RecipeError, match="many.yml:12: models.0..model: 'nowhere' does not exist"):
        merge("many.yml", "out")
    assert not Path("out").exists()


def test_several_need_a_folder():
    with pytest.raises(RecipeError, match="holds 2 recipes, whose results need a folder, and not the file out.safetensors"):
        merge("many.yml", "out.safetensors")
