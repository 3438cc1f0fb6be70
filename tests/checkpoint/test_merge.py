"""Merging files gives what merging the same tensors in memory gives, and the same bytes whatever the shards and threads."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint import memory, pipeline
from pymerge.checkpoint.merge import merge
from pymerge.merge_methods import registry
from pymerge.recipe import load_recipe

from .files import save_model, tensors_of, tree


def models(folder, count=3, dtype=torch.float32, shards=1):
    base = tensors_of(0, dtype)
    found = [base] + [{n: (t.float() + 0.1 * tensors_of(i)[n]).to(dtype) for n, t in base.items()} for i in range(1, count + 1)]
    for i, tensors in enumerate(found):
        save_model(folder / ("base" if i == 0 else f"m{i}"), tensors, shards)
    return found


def recipe_of(method, count=3, base="base", first=1, **more):
    recipe = {"merge_method": method, "models": [{"model": f"m{i}"} for i in range(first, count + 1)], **more}
    return {**recipe, "base_model": base} if base else recipe


def load_all(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def equal(got, expected):
    return set(got) == set(expected) and all(torch.equal(got[k], expected[k]) and got[k].dtype == expected[k].dtype for k in expected)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


CASES = {
    "ties": (
        recipe_of("ties", parameters={"weight": 0.5, "density": 0.4, "lambda": 1.5}),
        lambda b, m: pymerge.ties(b, m, weights=0.5, density=0.4, scale=1.5),
    ),
    "task_arithmetic": (recipe_of("task_arithmetic", parameters={"weight": 0.3}), lambda b, m: pymerge.task_arithmetic(b, m, 0.3)),
    "dare_ties": (
        recipe_of("dare_ties", parameters={"weight": 0.3, "density": 0.5, "seed": 5, "convention": "default"}),
        lambda b, m: pymerge.dare_ties(b, m, weights=0.3, density=0.5, seed=5),
    ),
    "linear": (recipe_of("linear", base=None, parameters={"weight": 2}), lambda b, m: pymerge.linear(m, weights=2)),
    "linear with base": (recipe_of("linear", parameters={"weight": 2}), lambda b, m: pymerge.linear([*m, b], weights=2)),
    "slerp": (recipe_of("slerp", 1, parameters={"t": 0.3}), lambda b, m: pymerge.slerp(b, m[0], t=0.3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_same_as_in_memory(tmp_path, case, dtype):
    recipe, expected = CASES[case]
    base, *others = models(tmp_path, dtype=dtype)
    report = pymerge.merge(recipe, "out")
    assert report.out == tmp_path / "out" and report.tensors == len(base)
    assert equal(load_all(tmp_path / "out"), expected(base, others))


def test_base_listed_among_the_models(tmp_path):
    base, *others = models(tmp_path)
    recipe = recipe_of("ties", parameters={"weight": 1, "density": 0.5})
    merge({**recipe, "models": [{"model": "./base/"}, *recipe["models"]]}, "with")
    merge(recipe, "without")
    assert (tmp_path / "with/model.safetensors").read_bytes()[-1000:] == (tmp_path / "without/model.safetensors").read_bytes()[-1000:]
    assert equal(load_all(tmp_path / "with"), load_all(tmp_path / "without"))
    linear = recipe_of("linear", parameters={"weight": 1})
    merge({**linear, "models": [{"model": "base", "parameters": {"weight": 3}}, *linear["models"]]}, "linear")
    assert equal(load_all(tmp_path / "linear"), pymerge.linear([base, *others], weights=[3, 1, 1, 1]))


def test_gradients_and_filters_reach_the_method(tmp_path):
    base, *others = models(tmp_path)
    weight = [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]
    merge(recipe_of("task_arithmetic", parameters={"weight": weight}), "out")
    got = load_all(tmp_path / "out")
    for name, tensor in base.items():
        w = int(name.split(".")[2]) / 2 if "self_attn" in name else 0.5
        assert torch.equal(got[name], pymerge.task_arithmetic(tensor, [m[name] for m in others], w))


@pytest.mark.parametrize(("dtype", "out_dtype"), [("bfloat16", None), ("float32", "bfloat16"), (None, "float16"), ("float64", None)])
def test_dtypes(tmp_path, dtype, out_dtype):
    base, *others = models(tmp_path)
    recipe = recipe_of("ties", parameters={"weight": 1, "density": 0.5}, dtype=dtype, out_dtype=out_dtype)
    merge(recipe, "out")
    work = getattr(torch, dtype or "float32")
    final = getattr(torch, out_dtype or dtype or "float32")
    cast = [{n: t.to(work) for n, t in m.items()} for m in (base, *others)]
    assert equal(load_all(tmp_path / "out"), pymerge.ties(cast[0], cast[1:], density=0.5, dtype=final))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == str(final).removeprefix("torch.")


def test_dtype_options_override_the_recipe(tmp_path):
    models(tmp_path)
    merge(recipe_of("linear", parameters={"weight": 1}, out_dtype="float16"), "out", out_dtype=torch.bfloat16)
    assert {t.dtype for t in load_all(tmp_path / "out").values()} == {torch.bfloat16}


def test_mixed_dtypes_promote(tmp_path):
    a, b = tensors_of(0, torch.bfloat16), tensors_of(1, torch.float16)
    save_model(tmp_path / "m1", a)
    save_model(tmp_path / "m2", b)
    merge(recipe_of("linear", 2, base=None, parameters={"weight": 1}), "out")
    assert equal(load_all(tmp_path / "out"), pymerge.linear([{n: t.float() for n, t in m.items()} for m in (a, b)]))


def test_deterministic(tmp_path, monkeypatch):
    """Threads, batches, the shards of the inputs and of the output change no tensor; the same call gives the same files."""
    models(tmp_path)
    recipe = recipe_of("dare_ties", parameters={"weight": 1, "density": 0.5})
    merge(recipe, "one/out", threads=1)
    merge(recipe, "two/out", threads=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    expected = load_all(tmp_path / "one/out")
    merge(recipe, "shards", shard_size=3000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert equal(load_all(tmp_path / "shards"), expected)
    monkeypatch.setattr(memory, "BATCH", 1)
    monkeypatch.setattr(pipeline, "CHUNK", 100)
    for model in ("base", "m1", "m2", "m3"):
        (tmp_path / model / "model.safetensors").unlink()
    models(tmp_path, shards=4)
    merge(recipe, "again")
    assert equal(load_all(tmp_path / "again"), expected)
    merge(recipe, "seeded", seed=1)
    assert not equal(load_all(tmp_path / "seeded"), expected)


def test_what_is_written(tmp_path):
    models(tmp_path, shards=2)
    recipe = recipe_of("linear", parameters={"weight": 1})
    (tmp_path / "base/merges.txt").write_text("a b")
    (tmp_path / "base/secret.txt").write_text("not copied")
    report = merge(recipe, "out")
    assert sorted(p.name for p in report.files) == sorted(tree(tmp_path / "out")) == [
        "README.md", "config.json", "merges.txt", "model.safetensors", "pymerge.json", "tokenizer.json"
    ]  # fmt: skip
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()
    with safe_open(tmp_path / "out/model.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["format"] == "pt" and metadata["pymerge_version"] == pymerge.__version__
    (tmp_path / "again.yml").write_text(metadata["pymerge_recipe"])
    assert load_recipe(tmp_path / "again.yml").to_dict() == recipe
    card = (tmp_path / "out/README.md").read_text()
    assert metadata["pymerge_recipe"].rstrip() in card and "# Merged model" in card and pymerge.__version__ in card
    assert report.bytes_read == 4 * report.bytes_written == 4 * sum(t.nbytes for t in tensors_of(0).values())


def test_single_file_in_and_out(tmp_path):
    a, b = tensors_of(0), tensors_of(1)
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    recipe = {"merge_method": "linear", "models": [{"model": f"{m}.safetensors"} for m in "ab"], "parameters": {"weight": 1}}
    report = merge(recipe, "c.safetensors")
    assert report.files == (tmp_path / "c.safetensors",)
    assert equal(load_file("c.safetensors"), pymerge.linear([a, b]))
    with pytest.raises(ValueError, match="exists already"):
        merge(recipe, "c.safetensors")
    merge(recipe, "c.safetensors", force=True)
    merge(recipe, "folder")
    assert sorted(tree(tmp_path / "folder")) == ["README.md", "model.safetensors", "pymerge.json"]


def test_other_tensors_are_copied(tmp_path):
    extra = {"ids": torch.arange(4), "mask": torch.tensor([True, False]), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)}
    for name in ("m1", "m2"):
        save_model(tmp_path / name, {**tensors_of(0), **extra})
    merge(recipe_of("linear", 2, base=None, parameters={"weight": 1}, out_dtype="bfloat16"), "out")
    got = load_all(tmp_path / "out")
    assert torch.equal(got["ids"], extra["ids"]) and torch.equal(got["mask"], extra["mask"])
    assert got["empty"].shape == (0, 3) and got["scalar"].dtype == torch.bfloat16


def test_progress(tmp_path):
    models(tmp_path)
    seen = []
    report = merge(recipe_of("linear", parameters={"weight": 1}), "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.bytes_read + report.bytes_written,) * 2
    assert seen == sorted(seen)


def test_a_method_of_ones_own(tmp_path, monkeypatch):
    """One that ignores `out`, and that computes in the dtype it is given."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    seen = []

    @registry.register_method("halfway", base="required", max_models=1, summary="between")
    def halfway(base, models, *, name, dtype, out, check_finite):
        seen.append(base.dtype)
        return ((base + models[0]) / 2).to(dtype)

    base, other = models(tmp_path, 1, torch.bfloat16)
    merge(recipe_of("halfway", 1, dtype="float32", out_dtype="bfloat16"), "out")
    assert set(seen) == {torch.float32}
    assert equal(load_all(tmp_path / "out"), {n: ((t.float() + other[n].float()) / 2).bfloat16() for n, t in base.items()})


def test_transformers_loads_the_result(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    for i in (1, 2):
        torch.manual_seed(i)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / f"m{i}")
    merge(recipe_of("linear", 2, base=None, parameters={"weight": 1}), "out", shard_size="20KB")
    a, b, c = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("m1", "m2", "out"))
    assert all(torch.equal(c[name], (a[name] + b[name]) / 2) for name in a)
