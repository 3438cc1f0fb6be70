"""Budgets: the same bytes however little memory there is, ranks over models that are never in memory, and what is read how often."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge import merge
from pymerge.checkpoint import memory
from pymerge.checkpoint.merge import MergeError
from pymerge.checkpoint.plan import make_plan
from pymerge.checkpoint.verify import verify
from pymerge.checkpoint.writer import CheckpointWriter
from pymerge.merge_methods import registry

from .files import save_model, tree
from .test_merge import equal, load_all, recipe_of

WEIGHTED = {"weight": 1, "density": 0.3}
PARAMETERS = {
    "linear": {"weight": 1},
    "task_arithmetic": {"weight": 0.5},
    "ties": WEIGHTED,
    "dare_ties": {**WEIGHTED, "seed": 3},
    "dare_linear": {**WEIGHTED, "seed": 3, "convention": "default"},
    "wise_ft": {"alpha": 0.3},
    "slerp": {"t": 0.4},
}


def large_tensors(seed, dtype=torch.bfloat16):
    """More than a slice each, when slices are short; integers too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.b.weight": (300, 200), "model.a.weight": (50, 999), "model.norm": (64,), "model.empty": (0, 3)}
    tensors = {
        name: (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + torch.randn(shape, generator=generator) / 8).to(dtype)
        for name, shape in shapes.items()
    }
    return {**tensors, "model.ids": torch.arange(40_000)}


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {}
    for i, name in enumerate(("base", "m1", "m2", "m3")):
        tensors[name] = large_tensors(i)
        save_model(tmp_path / name, tensors[name], shards=1 + i)
    return tensors


@pytest.fixture
def short_slices(monkeypatch):
    """Slices of one unit, in which nothing fits whole."""
    monkeypatch.setattr(memory, "LEAST_MEMORY", 1)
    monkeypatch.setattr(memory, "BATCH", 50_000)


def ties_of_all(**parameters):
    return recipe_of("ties", parameters={**WEIGHTED, **parameters})


@pytest.mark.parametrize("method", PARAMETERS)
def test_same_bytes_whatever_the_budget(models, short_slices, method):
    count = min(3, registry.get_method(method).max_models)
    recipe = recipe_of(method, count, parameters=PARAMETERS[method])
    merge(recipe, "whole", memory="1GB")
    for i, budget in enumerate((200_000, "500kB")):
        report = merge(recipe, f"sliced{i}", memory=budget)
        assert not report.warnings
        assert equal(load_all(Path(f"sliced{i}")), load_all(Path("whole")))


def test_casts_and_narrow_types(models, tmp_path, short_slices):
    for number, model in enumerate(("base", "m1", "m2", "m3")):
        for file in (tmp_path / model).glob("model*"):
            file.unlink()
        save_model(tmp_path / model, large_tensors(number, (torch.float32, torch.float64, torch.float16, torch.float8_e4m3fn)[number]))
    for i, options in enumerate(({"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "bfloat16"}, {"out_dtype": "float16"}, {})):
        recipe = {**ties_of_all(), **options}
        merge(recipe, f"whole{i}", memory="1GB")
        merge(recipe, f"sliced{i}", memory=300_000)
        assert equal(load_all(Path(f"sliced{i}")), load_all(Path(f"whole{i}")))


@pytest.mark.parametrize("convention", ["paper", "mergelm", "fusion_bench"])
@pytest.mark.parametrize("budget", [150_000, "1GB"])
def test_ranks_over_the_whole_model(models, short_slices, convention, budget):
    merge(ties_of_all(convention=convention), "out", memory=budget)
    want = pymerge.ties(models["base"], [models[f"m{i}"] for i in (1, 2, 3)], density=0.3, convention=convention)
    assert equal(load_all(Path("out")), want)


def test_ranks_over_the_whole_model_with_a_tensor_in_fp64(models, tmp_path, short_slices):
    for name, tensors in models.items():
        tensors["model.norm"] = tensors["model.norm"].double() / 3
        save_file(tensors, tmp_path / f"{name}.safetensors")
    recipe = {
        "merge_method": "ties",
        "base_model": "base.safetensors",
        "models": [{"model": f"m{i}.safetensors", "parameters": {"density": 0.1 * i, "weight": i}} for i in (1, 2, 3)],
        "parameters": {"convention": "paper", "lambda": 0.5},
    }
    merge(recipe, "out.safetensors", memory=400_000)
    others = [models[f"m{i}"] for i in (1, 2, 3)]
    densities = [0.1, 0.2, 0.1 * 3]
    want = pymerge.ties(models["base"], others, weights=[1, 2, 3], density=densities, scale=0.5, convention="paper")
    assert equal(load_file("out.safetensors"), want)


def test_ranks_over_the_whole_model_need_the_same_densities_everywhere(models):
    parameters = {**WEIGHTED, "density": [{"filter": "norm", "value": 0.5}, {"value": 0.2}], "convention": "paper"}
    with pytest.raises(ValueError, match=r"ranks over the whole model need the same densities.*'model\.\w+.*' and 'model\.norm' differ"):
        make_plan(recipe_of("ties", parameters=parameters))
    varying = {**WEIGHTED, "weight": [{"filter": "norm", "value": 0.5}, {"value": 2}], "convention": "paper"}
    merge(recipe_of("ties", parameters=varying), "out")


def test_what_is_read_how_often(models, short_slices):
    """Elementwise methods read once whatever the budget, TIES twice what does not fit; copied and small tensors are read once."""
    large = sum(4 * models["base"][name].nbytes for name in ("model.a.weight", "model.b.weight"))
    once = sum(4 * tensor.nbytes for tensor in models["base"].values())
    ids = 4 * models["base"]["model.ids"].nbytes
    for recipe, budget, want in [
        (recipe_of("task_arithmetic", parameters={"weight": 1}), 200_000, once),
        (recipe_of("dare_ties", parameters={**WEIGHTED, "convention": "default"}), 200_000, once),
        (ties_of_all(), "1GB", once),
        (ties_of_all(), 200_000, once + large),
        (recipe_of("dare_ties", parameters=WEIGHTED), 200_000, once + large),
        (ties_of_all(convention="paper"), 200_000, 2 * once - ids),
    ]:
        assert merge(recipe, "out", memory=budget, force=True).bytes_read == want


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
def test_what_was_interrupted_between_slices_is_resumed_and_verified(models, short_slices, convention):
    """Tensors that are done are ranked together with the others all the same, and slices of one that is not are merged again."""
    recipe = ties_of_all(convention=convention)
    merge(recipe, "whole", memory=150_000)
    original, count = CheckpointWriter.write, 0

    def write(self, name, data, start=0):
        nonlocal count
        count += 1
        if count == 14:
            raise OSError(28, "No space left on device")
        original(self, name, data, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", write)
        with pytest.raises(OSError, match="No space left"):
            merge(recipe, "out", memory=150_000)
    report = merge(recipe, "out", memory=200_000, resume=True)
    assert 0 < report.resumed < report.tensors
    assert tree(Path("out")) == tree(Path("whole"))
    found = verify("out", sample=1)
    assert found.ok and len(found.checked) == 1


def test_a_budget_has_to_be_worth_something(models):
    with pytest.raises(MergeError, match=r"a memory budget of 1 MB is too small; it must be at least 67.1 MB"):
        merge(ties_of_all(), "out", memory="1MB")
    with pytest.raises(ValueError, match="is not a size"):
        merge(ties_of_all(), "out", memory="lots")


def test_a_method_that_needs_whole_tensors_gets_them_and_says_so(models, monkeypatch, short_slices):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @registry.register_method("halfway", base="required", max_models=1, summary="between")
    def halfway(base, models, *, name, dtype, out, check_finite):
        return ((base + models[0]) / 2).to(dtype)

    report = merge(recipe_of("halfway", 1), "out", memory=250_000)
    assert {w.partition(" takes")[0] for w in report.warnings} == {"'model.b.weight'", "'model.a.weight'"}
    assert "'halfway' needs the whole tensor" in report.warnings[0]
    assert equal(load_all(Path("out")), {n: ((t + models["m1"][n]) / 2).to(t.dtype) for n, t in models["base"].items()})


def test_values_that_are_not_finite_are_named_by_their_place_in_the_tensor(tmp_path, models, short_slices):
    models["m2"]["model.b.weight"][250, 3] = float("nan")
    for file in (tmp_path / "m2").glob("model*"):
        file.unlink()
    save_model(tmp_path / "m2", models["m2"])
    for recipe in (ties_of_all(), ties_of_all(convention="paper"), recipe_of("linear", parameters={"weight": 1})):
        with pytest.raises(pymerge.NonFiniteError, match=r"m2: 'model.b.weight' has .* the first nan at index \[250, 3\]"):
            merge(recipe, "out", memory=200_000)
        assert not (tmp_path / "out").exists()


PROCESS = """
import json, resource, sys
import pymerge
from pymerge.checkpoint.merge import merge
recipe = json.loads(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for convention in ("mergekit", "paper"):
    recipe["parameters"]["convention"] = convention
    merge(recipe, f"out-{convention}", memory="64MiB", threads=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kilobytes")
def test_a_process_keeps_within_its_budget(tmp_path, monkeypatch):
    """A tensor of 64 MB in each of four models, within 64 MiB; the first merge of a process also loads code."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "m1", "m2", "m3")):
        tensor = torch.randn(8000, 4000, generator=torch.Generator().manual_seed(i)).bfloat16()
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    models = [{"model": f"m{i}.safetensors"} for i in (1, 2, 3)]
    recipe = {"merge_method": "ties", "base_model": "base.safetensors", "models": models, "parameters": WEIGHTED}
    done = subprocess.run([sys.executable, "-c", PROCESS, json.dumps(recipe)], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) * 1024 < 64 * 2**20 + 40 * 2**20
