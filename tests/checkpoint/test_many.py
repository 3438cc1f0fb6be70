"""Files with several recipes: each is merged after what it uses, once."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.beside import extra_files
from pymerge.checkpoint.format import read_header
from pymerge.checkpoint.many import plan_all, plan_merges
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
    shutil.rmtree("out/stage")  # then what was made of it would be made again, and replaced
    with pytest.raises(RecipeError, match="out/merged: exists already"):
        planned()
    assert planned(force=True) == [("stage", True)] and not Path("out/stage").exists()
    shutil.rmtree("out/merged")
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


def test_every_problem_of_every_recipe_at_once():
    """Also of one that uses another's result, which is not there; but not what only follows from another's problem."""
    more = """\
---
name: third
merge_method: linear
models: [{model: nope}]
parameters: {weight: 1}
---
name: fourth
merge_method: linear
models: [{model: stage}, {model: other}]
parameters: {weight: 1}
---
name: fifth
merge_method: linear
models: [{model: third}, {model: a, parameters: {weigth: 2}}]
"""
    save_model(Path("other"), {"w": torch.ones(3)})
    Path("many.yml").write_text(MANY + more)
    with pytest.raises(RecipeError) as caught:
        merge("many.yml", "out")
    texts = [str(problem) for problem in caught.value.problems]
    assert texts[0].startswith("many.yml:12: models[0].model: 'nope' does not exist")
    assert all("many.yml:17: " in text for text in texts[1:]) and "other lacks 12 tensors" in "".join(texts[1:]), texts
    assert not Path("out").exists()


def test_a_plan_knows_the_results_that_are_not_there():
    """All of a plan is the same before and after what it uses is merged: sizes, order, config, tokenizer."""
    Path("many.yml").write_text(MANY.replace("models: [{model: stage}", "tokenizer_source: stage\nmodels: [{model: stage}"))
    Path("a/config.json").write_text('{"model_type": "llama", "torch_dtype": "float32", "vocab_size": 40, "bos_token_id": 1}')
    for name in "abc":
        tokens = {f"t{i}": i for i in range(40 if name != "c" else 30)}
        Path(name, "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": tokens}}))
    before = {path for path in Path(tempfile.gettempdir()).glob("pymerge-plan-*")}
    with plan_all("many.yml", "out") as merges:
        assert [(m.name, m.place, m.there) for m in merges] == [("stage", Path("out/stage"), False), ("merged", Path("out/merged"), False)]
        planned_first = merges[1].plan
        merge("many.yml", "out")
        with plan_all("many.yml", "out") as again:
            assert [m.there for m in again] == [True, True]
            now = again[1].plan
            assert [t.output for t in planned_first.tensors] == [t.output for t in now.tensors]
            assert [t.parameters for t in planned_first.tensors] == [t.parameters for t in now.tensors]
            assert planned_first.layout == now.layout
            assert extra_files(planned_first) == extra_files(now)
    assert {path for path in Path(tempfile.gettempdir()).glob("pymerge-plan-*")} == before


def test_room_for_all_results_together(monkeypatch):
    with plan_all("many.yml", "out") as merges:
        sizes = [m.plan.nbytes_on_disk for m in merges]
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=max(sizes) + 1))
    with pytest.raises(RecipeError, match=r"out: needs .* but its disk has .* free; make room"):
        merge("many.yml", "out")
    assert not Path("out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=sum(sizes)))
    merge("many.yml", "out")


def test_several_need_a_folder():
    with pytest.raises(RecipeError, match="holds 2 recipes, whose results need a folder, and not the file out.safetensors"):
        merge("many.yml", "out.safetensors")
