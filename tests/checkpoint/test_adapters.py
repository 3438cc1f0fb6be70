"""Adapters merged with each other: what the product of the result is, what PEFT makes of the same, what is refused."""

import itertools
import json

import pytest
import torch

import pymerge
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.load import load_tensor
from pymerge.checkpoint.lora import AdaptedCheckpoint, open_adapter
from pymerge.checkpoint.lora.factoring import factor_matrix, factor_product
from pymerge.checkpoint.reader import open_checkpoint

from .adapters import save_adapter
from .files import save_model, tree

SHAPES = {"model.layers.0.q": (12, 20), "model.layers.1.q": (12, 20), "model.layers.11.q": (30, 12)}


def pairs(seed, rank, dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, shape[1], generator=g).to(dtype), torch.randn(shape[0], rank, generator=g).to(dtype))
        for name, shape in shapes.items()
    }


def products(path):
    """Each module's change, in fp64."""
    with open_adapter(path) as adapter:
        result = {}
        for name, change in adapter.modules.items():
            b, a = adapter.factors(change)
            result[name] = change.scale * b.double() @ a.double()
        return result


@pytest.fixture
def three(tmp_path):
    save_adapter(tmp_path / "a", pairs(0, 3), lora_alpha=7)
    save_adapter(tmp_path / "b", pairs(1, 4), use_rslora=True, lora_alpha=5)
    save_adapter(tmp_path / "c", pairs(2, 2), alpha_pattern={"1.q": 3})
    return [tmp_path / name for name in "abc"]


WEIGHTS = [0.5, -2.0, 1.25]


def weighted_sum(paths, weights=WEIGHTS):
    each = [products(path) for path in paths]
    return {name: sum(w * p[name] for w, p in zip(weights, each)) for name in each[0]}


def test_cat_is_the_sum(three, tmp_path):
    report = pymerge.merge_adapters(three, tmp_path / "out", weights=WEIGHTS)
    assert set(report.ranks.values()) == {9} and set(report.kept.values()) == {1.0} and report.warnings == ()
    expected = weighted_sum(three)
    for name, got in products(tmp_path / "out").items():
        assert torch.allclose(got, expected[name], rtol=1e-5, atol=1e-5)
    assert sorted(tree(tmp_path / "out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "pymerge.json"]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and config["target_modules"] == sorted(SHAPES) and config["use_rslora"] is False


def test_cat_of_equal_scales_keeps_every_bit(tmp_path):
    """bf16 factors stay bf16 and as they are; weights that are no powers of two would need rounding, so the result is then fp32."""
    for seed in (0, 1):
        save_adapter(tmp_path / str(seed), pairs(seed, 2, torch.bfloat16), lora_alpha=3)
    paths = [tmp_path / "0", tmp_path / "1"]
    pymerge.merge_adapters(paths, tmp_path / "out", weights=[0.3, 0.15])
    with open_adapter(tmp_path / "out") as out, open_adapter(paths[0]) as first, open_adapter(paths[1]) as second:
        for name, change in out.modules.items():
            b, a = out.factors(change)
            assert a.dtype == torch.bfloat16
            assert torch.equal(b, torch.cat([first.factors(first.modules[name])[0], second.factors(second.modules[name])[0]], 1))
            assert torch.equal(a[:2], first.factors(first.modules[name])[1])
            assert torch.equal(a[2:], 0.5 * second.factors(second.modules[name])[1])
    expected = weighted_sum(paths, [0.3, 0.15])
    assert all(torch.allclose(got, expected[name], rtol=1e-12) for name, got in products(tmp_path / "out").items())
    pymerge.merge_adapters(paths, tmp_path / "odd", weights=[0.3, 0.2])
    assert open_checkpoint(tmp_path / "odd/adapter_model.safetensors").tensors.popitem()[1].dtype == "F32"
    pymerge.merge_adapters(paths, tmp_path / "chosen", weights=[0.3, 0.2], dtype="bfloat16")
    assert open_checkpoint(tmp_path / "chosen/adapter_model.safetensors").tensors.popitem()[1].dtype == "BF16"


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def test_svd_is_the_nearest_of_its_rank(three, tmp_path):
    report = pymerge.merge_adapters(three, tmp_path / "out", method="svd", weights=WEIGHTS, rank=5)
    expected = weighted_sum(three)
    for name, got in products(tmp_path / "out").items():
        best = truncated(expected[name], 5)
        assert torch.allclose(got, best, rtol=1e-4, atol=1e-4)
        assert report.ranks[name] == 5
        assert abs(report.kept[name] - float(best.square().sum() / expected[name].square().sum())) < 1e-9
    assert set(pymerge.merge_adapters(three, tmp_path / "default", method="svd").ranks.values()) == {4}  # the largest of the inputs
    whole = pymerge.merge_adapters(three, tmp_path / "whole", method="svd", weights=WEIGHTS, energy=1.0)
    assert set(whole.ranks.values()) == {9}


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_energy_chooses_the_smallest_rank(three, tmp_path, energy):
    report = pymerge.merge_adapters(three, tmp_path / "out", method="svd", energy=energy)
    for name, matrix in weighted_sum(three, [1, 1, 1]).items():
        share = torch.cumsum(torch.linalg.svdvals(matrix).square(), 0) / matrix.square().sum()
        assert report.ranks[name] == int((share < energy).sum()) + 1
    assert max(pymerge.merge_adapters(three, tmp_path / "capped", method="svd", energy=energy, rank=2).ranks.values()) <= 2


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.4}),
        ("ties", {"density": [0.4, 0.5, 1.0], "lambda": 0.5}),
        ("dare_ties", {"density": 0.6, "seed": 3}),
        ("linear", {}),
        ("task_arithmetic", {"lambda": 2.0}),
    ],
)
def test_products_are_merged_as_models_are(three, tmp_path, method, parameters):
    """The result at full rank, added to a base of zeros, is the merge of the adapted models."""
    base = save_model(tmp_path / "base", {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()})
    models = []
    for i, path in enumerate(three):
        with AdaptedCheckpoint(open_checkpoint(base), open_adapter(path)) as store:
            save_model(tmp_path / f"m{i}", {name: load_tensor(store, info) for name, info in store.tensors.items()})
        values = parameters.get("density")
        own = {"weight": abs(WEIGHTS[i]), **({"density": values[i] if isinstance(values, list) else values} if values else {})}
        models.append({"model": str(tmp_path / f"m{i}"), "parameters": own})
    recipe = {"merge_method": method, "models": models, "parameters": {k: v for k, v in parameters.items() if k != "density"}}
    pymerge.merge(recipe if method == "linear" else {**recipe, "base_model": str(base)}, tmp_path / "merged.safetensors")
    report = pymerge.merge_adapters(
        three, tmp_path / "out", method=method, weights=list(map(abs, WEIGHTS)), parameters=parameters, energy=1.0
    )
    assert min(report.kept.values()) > 0.999999
    with open_checkpoint(tmp_path / "merged.safetensors") as merged:
        for name, got in products(tmp_path / "out").items():
            assert torch.allclose(got.float(), load_tensor(merged, merged.tensors[f"{name}.weight"]), rtol=1e-4, atol=1e-4)


def test_same_bytes_each_time(three, tmp_path):
    for options in ({"method": "cat"}, {"method": "svd", "rank": 3}, {"method": "dare_ties", "parameters": {"density": 0.5}}):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pymerge.merge_adapters(three, tmp_path / "out", weights=WEIGHTS, force=True, **options)
            found.append(tree(tmp_path / "out"))
        assert found[0] == found[1]


def test_modules_of_some_adapters(tmp_path):
    first, second = pairs(0, 2), pairs(1, 2)
    del first["model.layers.0.q"], second["model.layers.11.q"]
    save_adapter(tmp_path / "a", first)
    save_adapter(tmp_path / "b", second)
    for options in ({}, {"method": "svd", "energy": 1.0}, {"method": "task_arithmetic", "energy": 1.0}):
        report = pymerge.merge_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out", force=True, **options)
        assert len(report.warnings) == 2 and "does not change 1 of the 3 modules" in report.warnings[0]
        each = products(tmp_path / "a"), products(tmp_path / "b")
        for name, got in products(tmp_path / "out").items():
            assert torch.allclose(got, sum(p.get(name, torch.zeros(1)) for p in each), rtol=1e-4, atol=1e-4)
        assert set(report.ranks.values()) == {2, 4}


def test_convolutions_and_embeddings(tmp_path):
    for seed in (0, 1):
        g = torch.Generator().manual_seed(seed)
        conv = {"conv": (torch.randn(2, 5, 3, 3, generator=g), torch.randn(6, 2, 1, 1, generator=g))}
        embedding = {"e.lora_embedding_A": torch.randn(2, 9, generator=g), "e.lora_embedding_B": torch.randn(4, 2, generator=g)}
        save_adapter(tmp_path / str(seed), conv, embedding)
    paths = [tmp_path / "0", tmp_path / "1"]
    for options in ({}, {"method": "svd", "energy": 1.0}):
        pymerge.merge_adapters(paths, tmp_path / "out", force=True, **options)
        got, expected = products(tmp_path / "out"), weighted_sum(paths, [1, 1])
        assert all(torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-4) for name in expected)
    with open_adapter(tmp_path / "out") as out:
        assert {name: (change.kind, change.shape) for name, change in out.modules.items()} == {
            "conv": ("conv", (6, 5, 3, 3)),
            "e": ("embedding", (9, 4)),
        }


def refused(error, message, paths, out, **options):
    with pytest.raises(error, match=message):
        pymerge.merge_adapters(paths, out, **options)
    assert not out.exists()


def test_refused(three, tmp_path):
    out = tmp_path / "out"
    refused(ValueError, "no adapters", [], out)
    refused(ValueError, "weights has 2 numbers for 3", three, out, weights=[1, 2])
    refused(ValueError, "no method 'tiez' for adapters; did you mean 'ties'", three, out, method="tiez")
    refused(ValueError, "'ties' has no parameter 'densty'; did you mean 'density'", three, out, method="ties", parameters={"densty": 1})
    refused(ValueError, "density is 2; density is the fraction kept", three, out, method="ties", parameters={"density": 2})
    refused(ValueError, "density has 2 values for 3", three, out, method="ties", parameters={"density": [1, 0.5]})
    refused(ValueError, "'cat' has no parameter 'density'", three, out, parameters={"density": 1})
    refused(ValueError, "cat has no choice of rank", three, out, rank=3)
    refused(ValueError, "rank is 0", three, out, method="svd", rank=0)
    refused(ValueError, "energy is 1.5", three, out, method="svd", energy=1.5)
    refused(ValueError, "on is 'A'", three, out, on="A")
    refused(ValueError, "'svd' is about the products", three, out, method="svd", on="factors")
    refused(ValueError, "'breadcrumbs' cannot be applied to factors", three, out, method="breadcrumbs", on="factors")
    refused(ValueError, "dtype 'int8' is not a dtype", three, out, dtype="int8")
    refused(ValueError, "sum to zero", three[:2], out, method="linear", weights=[1, -1])
    refused(CheckpointError, "factors of different ranks", three, out, method="linear", on="factors")
    refused(CheckpointError, "is not a LoRA adapter", [tmp_path], out)


def test_adapters_that_do_not_fit_each_other(three, tmp_path):
    out = tmp_path / "out"
    save_adapter(tmp_path / "base", pairs(3, 2), base_model_name_or_path="another")
    refused(CheckpointError, r"name different base models .*another.*--any-base", [three[0], tmp_path / "base"], out)
    report = pymerge.merge_adapters([three[0], tmp_path / "base"], tmp_path / "any", check_base=False)
    assert "different base models" in report.warnings[0]
    save_adapter(tmp_path / "shape", pairs(3, 2, shapes={"model.layers.0.q": (12, 21)}))
    refused(CheckpointError, r"is linear \[12, 21\], in another adapter linear \[12, 20\]", [three[0], tmp_path / "shape"], out)
    save_adapter(tmp_path / "bias", pairs(3, 2), {"model.layers.0.q.lora_B.bias": torch.ones(12)})
    refused(CheckpointError, "lora_bias", [three[0], tmp_path / "bias"], out)
    for name, value in (("x", 1.0), ("y", 2.0), ("z", 1.0)):
        save_adapter(tmp_path / name, pairs(3, 2), {"score.weight": torch.full((2, 2), value)}, modules_to_save=["score"])
    refused(CheckpointError, "'score.weight' as a whole .* so has .*x, in another way", [tmp_path / "x", tmp_path / "y"], out)
    refused(CheckpointError, "and another adapter has not", [three[0], tmp_path / "x"], out)
    pymerge.merge_adapters([tmp_path / "x", tmp_path / "z"], out)
    with open_adapter(out) as merged:
        assert list(merged.replaced) == ["score.weight"] and merged.config.content["modules_to_save"] == ["score"]


def test_overflow_and_nan(tmp_path):
    save_adapter(tmp_path / "a", {"m": (torch.full((2, 3), 6e4), torch.full((4, 2), 6e4))})
    refused(CheckpointError, "lora_A overflows", [tmp_path / "a"], tmp_path / "out", method="svd", dtype="float16", weights=1e6)
    save_adapter(tmp_path / "n", {"m": (torch.full((2, 3), float("nan")), torch.ones(4, 2))})
    for method in ("cat", "svd", "ties"):
        refused(pymerge.NonFiniteError, "n: .*lora_A.weight' has NaN or Inf", [tmp_path / "n"], tmp_path / "out", method=method)


def test_output_exists(three, tmp_path):
    pymerge.merge_adapters(three[:1], tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists already"):
        pymerge.merge_adapters(three, tmp_path / "out")
    with pytest.raises(FileExistsError, match="is an input of the merge"):
        pymerge.merge_adapters(three, three[0], force=True)
    before = tree(three[0])
    with pytest.raises(FileExistsError, match="is inside an input of the merge"):
        pymerge.merge_adapters(three, three[0] / "inside")
    assert tree(three[0]) == before


@pytest.mark.parametrize(("rows", "columns", "rank"), [(200, 300, 8), (300, 150, 3), (30, 40, 8), (10, 200, 60)])
def test_factor_matrix(rows, columns, rank):
    """Few of many singular values come from block iteration, others from a full decomposition: both are the best of their rank."""
    g = torch.Generator().manual_seed(0)
    m = torch.randn(rows, columns, dtype=torch.float64, generator=g) * torch.logspace(0, -2, columns, dtype=torch.float64)
    b, a, kept = factor_matrix(m, rank, None)
    best = truncated(m, rank)
    assert float((m - b @ a).norm() / (m - best).norm().clamp(min=1e-9)) < 1 + 1e-6 or rank >= min(rows, columns)
    assert abs(kept - float(best.square().sum() / m.square().sum())) < 1e-8
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1))


def test_factors_of_nothing():
    for b, a, kept in (factor_matrix(torch.zeros(4, 5), 2, None), factor_product(torch.zeros(4, 2), torch.zeros(2, 5), None, 0.9)):
        assert kept == 1.0 and not b.any() and not a.any() and b.shape[1] >= 1


# --- PEFT itself -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {}),
        ("svd", {"method": "svd", "rank": 3}),
        ("linear", {"method": "linear", "on": "factors"}),
        ("ties", {"method": "ties", "on": "factors", "parameters": {"density": 0.5}}),
        ("ties_svd", {"method": "ties", "rank": 3, "parameters": {"density": 0.5, "convention": "peft"}}),
    ],
)
def test_same_as_add_weighted_adapter(tmp_path, kind, options):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(model, config, "a")
    model.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "down_proj"]))
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=g)
    model.save_pretrained(tmp_path)
    more = {"svd_rank": 3} if "svd" in kind else {}
    model.add_weighted_adapter(["a", "b"], [0.7, 1.5], "merged", combination_type=kind, density=0.5, **more)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    report = pymerge.merge_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[0.7, 1.5], **options)
    assert bool(report.warnings) == ("on" in options)
    expected, got = products(tmp_path / "merged"), products(tmp_path / "out")
    assert set(expected) == set(got) and len(got) == 2
    for name in expected:
        assert torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-4), name
    reloaded = peft.PeftModel.from_pretrained(model.get_base_model(), tmp_path / "out", adapter_name="again")
    weights = {name: p for name, p in reloaded.named_parameters() if ".again." in name}
    assert len(weights) == 2 * len(got)
    for name, left in itertools.islice(weights.items(), 4):
        assert left.dtype == torch.float32 and left.abs().sum() > 0, name


# --- Recipes and the command line ------------------------------------------------------------------------------------------------------


def run(*args):
    from click.testing import CliRunner

    from pymerge.cli.main import _group

    return CliRunner().invoke(_group, [str(arg) for arg in args])


RECIPE = """\
merge_method: svd
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
  - model: ./c
    parameters: {weight: 2}
parameters:
  rank: 3
out_dtype: float32
"""


def test_a_recipe_of_adapters_makes_an_adapter(three, tmp_path, monkeypatch):
    (tmp_path / "recipe.yml").write_text(RECIPE)
    pymerge.merge_adapters(three, tmp_path / "expected", method="svd", weights=[0.5, 1.0, 2.0], rank=3, dtype="float32")
    report = pymerge.merge(tmp_path / "recipe.yml", tmp_path / "out")
    assert tree(tmp_path / "out")["adapter_model.safetensors"] == tree(tmp_path / "expected")["adapter_model.safetensors"]
    assert report.tensors == 6 and all(path.is_file() for path in report.files)
    result = run("merge", tmp_path / "recipe.yml", tmp_path / "cli")
    assert result.exit_code == 0 and "an adapter of 3 modules" in result.output
    assert tree(tmp_path / "cli")["adapter_model.safetensors"] == tree(tmp_path / "out")["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("merge_method: svd", "merge_method: tiez", "no method 'tiez' for adapters"),
        ("merge_method: svd", "base_model: x\nmerge_method: svd", "recipe.yml:1: base_model: adapters are merged without their base"),
        ("rank: 3", "rank: [1, 2]", "recipe.yml:9: parameters.rank: is .*one value for all layers"),
        ("rank: 3", "rnak: 3", "'svd' has no parameter 'rnak'"),
        ("{weight: 2}", "{rank: 2}", "parameters.rank: is for the whole merge"),
        ("model: b", "model: b\n    wieght: 1", r"models\[1\].wieght: unknown key"),
    ],
)
def test_recipe_errors(three, tmp_path, old, new, message):
    (tmp_path / "recipe.yml").write_text(RECIPE.replace(old, new))
    with pytest.raises(pymerge.recipe.problems.RecipeError, match=message):
        pymerge.merge(tmp_path / "recipe.yml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(three, tmp_path):
    a, b, c = three
    result = run("lora", "merge", a, b, c, "-o", tmp_path / "out", "-w", 0.5, "-w", -2, "-w", 1.25)
    assert result.exit_code == 0 and "3 modules, rank 9" in result.output and "exact" in result.output
    pymerge.merge_adapters(three, tmp_path / "expected", weights=WEIGHTS)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    result = run("lora", "merge", a, b, "-o", tmp_path / "t", "--method", "ties", "-p", "density=0.5", "--rank", 2, "--json")
    assert result.exit_code == 0 and set(json.loads(result.output)["ranks"].values()) == {2}
    for args, message in (
        ((a, b, "-o", tmp_path / "out"), "exists already"),
        ((a, b, "-o", tmp_path / "new", "--rank", 2), "cat has no choice of rank"),
        ((a, b, "-o", tmp_path / "new", "-p", "density"), "'density' is not NAME=VALUE"),
    ):
        result = run("lora", "merge", *args)
        assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "new").exists()
