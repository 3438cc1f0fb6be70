"""Everything that stands against a merge is found before a tensor is read, all at once, each with its place."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint import pipeline, reader
from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.plan import make_plan
from pymerge.recipe import RecipeError

from .files import raw, save_model, tensors_of, tree


@pytest.fixture(autouse=True)
def no_tensor_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read_into(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(reader.Checkpoint, "read_into", read_into)


def problems_of(recipe, out="out", **options):
    with pytest.raises(RecipeError) as caught:
        merge(recipe, out, **options)
    return [str(problem) for problem in caught.value.problems]


def recipe_of(*models, method="linear", **more):
    return {"merge_method": method, "models": [{"model": m} for m in models], "parameters": {"weight": 1}, **more}


def two(tmp_path, a=None, b=None):
    save_model(tmp_path / "a", tensors_of(0) if a is None else a)
    save_model(tmp_path / "b", tensors_of(1) if b is None else b)


def test_all_at_once_with_lines(tmp_path):
    good, bad = tensors_of(0), tensors_of(1)
    del bad["model.norm.weight"]
    bad["model.norm.wieght"] = torch.ones(16)
    bad["lm_head.weight"] = torch.ones(41, 16)
    two(tmp_path, good, bad)
    (tmp_path / "c.safetensors").write_bytes(raw({}, length=500))
    (tmp_path / "r.yml").write_text("""\
merge_method: ties
base_model: a
dytpe: bfloat16
models:
  - model: b
    parameters:
      weigth: 1
  - model: c.safetensors
    parameters:
      weight: 1
  - model: org/model-7B
parameters:
  density: 2
""")
    before = tree(tmp_path)
    assert problems_of("r.yml") == [
        "r.yml:3: dytpe: unknown key; did you mean 'dtype'?",
        "r.yml:5: models[0].model: b lacks 1 tensor ('model.norm.weight') that a has; did you mean 'model.norm.wieght'?",
        "r.yml:5: models[0].model: b has 1 tensor ('model.norm.wieght') that a lacks",
        "r.yml:5: models[0].model: 'lm_head.weight' is [41, 16] in b and [40, 16] in a; "
        "'tokenizer_source' matches tokens, 'vocabulary' (crop or pad) only numbers of rows",
        "r.yml:6: models[0].parameters: 'weight' is required by 'ties' and is not given here nor in the global parameters",
        "r.yml:7: models[0].parameters.weigth: unknown parameter of 'ties'; did you mean 'weight'?",
        "r.yml:8: models[1].model: c.safetensors: truncated: header of 500 bytes announced, but the file has 10 bytes in all; "
        "copy or download it again",
        "r.yml:11: models[2].model: 'org/model-7B' is no path here and not in the Hugging Face cache; "
        "models are fetched only when asked for: --download (in Python, download=True) does it",
        "r.yml:11: models[2].parameters: 'weight' is required by 'ties' and is not given here nor in the global parameters",
        "r.yml:13: parameters.density: is 2; density is the fraction kept, between 0 and 1",
    ]
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("method", "hint"), [("dare-ties", "; did you mean 'dare_ties'?"), ("tie", "; did you mean 'ties'?"), ("zzz", "; there are ")]
)
def test_method_that_does_not_exist(tmp_path, method, hint):
    two(tmp_path)
    assert problems_of(recipe_of("a", "b", method=method))[0].startswith(f"recipe: merge_method: there is no method {method!r}{hint}")


def test_roles(tmp_path):
    two(tmp_path)
    assert problems_of(recipe_of("a", "b", method="ties"))[0].startswith("recipe: base_model: is required by 'ties'")
    alone = recipe_of("a", method="ties", base_model="a")
    assert "models: 'ties' takes at least 1 model besides the base; 0 given" in problems_of(alone)[0]
    slerp = {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5}}
    save_model(tmp_path / "c", tensors_of(2))
    three = {**slerp, "models": [{"model": "b"}, {"model": "c"}]}
    assert problems_of(three) == ["recipe: models: 'slerp' takes exactly 1 model besides the base; 2 given"]
    assert make_plan({**slerp, "models": [{"model": "a"}, {"model": "b"}]}).names == ("a", "b")
    assert make_plan({**slerp, "models": [{"model": "b"}]}).names == ("a", "b")


def test_what_a_method_refuses(tmp_path):
    two(tmp_path)
    assert "'linear' does not take these values" in problems_of({**recipe_of("a", "b"), "parameters": {"weight": 0}})[0]
    seed = {"weight": 1, "seed": -1}
    assert "seed" in problems_of({**recipe_of("b", method="dare_ties", base_model="a"), "parameters": seed})[0]
    gradient = {"weight": [0, 1]}
    assert "tensor 'lm_head.weight'" in problems_of({**recipe_of("a", "b"), "parameters": gradient})[0]


def test_missing_for_some_tensors(tmp_path):
    two(tmp_path)
    weight = [{"filter": "layers", "value": 1}]
    assert problems_of({**recipe_of("a", "b"), "parameters": {"weight": weight}}) == [
        f"recipe: models[{i}].parameters: 'weight' has no value for 'lm_head.weight' and 2 more: no filter matches; "
        "end its list with '- value: ...'" for i in (0, 1)
    ]  # fmt: skip


def test_kinds_of_tensors(tmp_path):
    two(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.int32)})
    assert "'w' is of dtype I32 in b and F32 in a; only floating dtypes may differ" in problems_of(recipe_of("a", "b"))[0]


def test_many_differences_are_summed_up(tmp_path):
    two(tmp_path, {f"w{i}": torch.ones(2) for i in range(20)}, {f"w{i}": torch.ones(3) for i in range(20)})
    found = problems_of(recipe_of("a", "b"))
    assert len(found) == 6 and "... and 15 more tensors like that" in found[-1]
    two(tmp_path, {f"w{i}": torch.ones(2) for i in range(20)}, {f"v{i}": torch.ones(2) for i in range(20)})
    assert "b lacks 20 tensors ('w0', 'w1', 'w10', 'w11', 'w12' and 15 more) that a has" in problems_of(recipe_of("a", "b"))[0]


def test_quantised_and_broken_configs(tmp_path):
    two(tmp_path)
    (tmp_path / "a/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    (tmp_path / "b/config.json").write_text("{")
    found = problems_of(recipe_of("a", "b"))
    assert "a is quantised" in found[0] and "config.json is not valid JSON" in found[1]


def test_no_tensors(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    two(tmp_path)
    assert "empty.safetensors has no tensors" in problems_of(recipe_of("empty.safetensors", "a"))[0]


def test_output_that_cannot_be(tmp_path, monkeypatch):
    two(tmp_path)
    recipe = recipe_of("a", "b")
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    for out, message in (
        ("a", "is an input"), ("b/merged", "is inside an input"), ("a/model.safetensors", "is inside an input|is an input"),
        (".", "contains an input|exists"), ("a/config.json/x", "is inside"), ("file/out", "cannot be made"),
    ):  # fmt: skip
        found = problems_of(recipe, out, force=True)
        assert any(part in found[0] for part in message.split("|")), (out, found)
    (tmp_path / "link").symlink_to("a")
    assert "is an input" in problems_of(recipe, "link", force=True)[0]
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert "but its disk has 10 B free" in problems_of(recipe)[0]


def test_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    two(tmp_path / "recipes")
    save_model(tmp_path / "elsewhere/b", tensors_of(1))
    save_model(tmp_path / "elsewhere/c", tensors_of(1))
    (tmp_path / "recipes/r.yml").write_text(json.dumps(recipe_of("a", "b", "c")))
    monkeypatch.chdir(tmp_path / "elsewhere")
    plan = make_plan(tmp_path / "recipes/r.yml")
    folders = [str(c.path.resolve().relative_to(tmp_path)) for c in plan.checkpoints]
    assert folders == ["recipes/a", "recipes/b", "elsewhere/c"]
    assert len(plan.warnings) == 1 and "'b' exists in the recipe's folder and in the current one" in plan.warnings[0]


def test_hints_for_paths(tmp_path):
    two(tmp_path)
    found = problems_of(recipe_of("a+lora", "bb", "./nothing/here"))
    assert "'lora' does not exist" in found[0]
    assert "'bb' does not exist; did you mean 'b'?" in found[1]
    assert "looked at" in found[2]
    assert [p[-14:] for p in problems_of(recipe_of("a\0b", "\ud800"))] == [" is not a path"] * 2
    save_model(tmp_path / "we+ird@x", tensors_of(0))
    assert make_plan(recipe_of("we+ird@x", "a")).names == ("we+ird@x", "a")


def test_repeated_model_and_unused_seed_warn(tmp_path):
    two(tmp_path)
    plan = make_plan(recipe_of("a", "b", "a"), seed=3)
    assert len(plan.checkpoints) == 2 and len(plan.tensors[0].inputs) == 3
    assert any("models[2].model: is the same checkpoint as models[0]" in w for w in plan.warnings)
    assert any("seed is not used" in w for w in plan.warnings)


def test_plan_says_what_will_be_done(tmp_path):
    two(tmp_path)
    plan = make_plan(recipe_of("a", "b", out_dtype="bfloat16"))
    total = sum(t.nbytes for t in tensors_of(0).values())
    assert (plan.bytes_read, plan.bytes_written) == (2 * total, total // 2)
    assert {t.output.name for t in plan.tensors} == set(tensors_of(0))
    assert plan.donor == (tmp_path / "a").relative_to(tmp_path) or plan.donor == tmp_path / "a"
    assert plan.schedule().buffers.inputs <= 2 * pipeline.CHUNK
