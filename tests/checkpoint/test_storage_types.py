"""Storage types in any mixture, and models that are no language models: nothing in the engine knows an architecture."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint.dtypes import code_of
from pymerge.recipe.problems import RecipeError

from .files import save_model

FLOATS = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
METHODS = {
    "linear": {"weight": 0.5},
    "ties": {"weight": 1.0, "density": 0.5},
    "task_arithmetic": {"weight": 0.25},
    "dare_linear": {"weight": 0.5, "density": 0.5, "seed": 1},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "slerp": {"t": 0.3},
}


def recipe(method, paths):
    base, *models = map(str, paths)
    if method == "slerp":
        models = models[:1]
    result = {"merge_method": method, "models": [{"model": m} for m in models], "parameters": METHODS[method]}
    return result if method == "linear" else {**result, "base_model": base}


def merged(method, paths, out, **options):
    pymerge.merge(recipe(method, paths), out, force=True, **options)
    return load_file(out)


@pytest.mark.parametrize("method", METHODS)
def test_mixtures_are_rounded_once(tmp_path, method):
    """Any types in, any type out: the fp32 result from the widened inputs, rounded to nearest even at the end."""
    mixtures = [*itertools.permutations(FLOATS, 3)][:: 7 if method in ("linear", "ties") else 20]
    g = torch.Generator().manual_seed(0)
    for i, mixture in enumerate(mixtures):
        tensors = [torch.randn(37, 11, generator=g).to(getattr(torch, name)) for name in mixture]
        narrow, wide = [], []
        for j, tensor in enumerate(tensors):
            narrow.append(tmp_path / f"n{j}.safetensors")
            wide.append(tmp_path / f"w{j}.safetensors")
            save_file({"w": tensor}, narrow[-1])
            save_file({"w": tensor.float()}, wide[-1])
        expected = merged(method, wide, tmp_path / "wide.safetensors")["w"]
        out = FLOATS[i % len(FLOATS)]
        got = merged(method, narrow, tmp_path / "narrow.safetensors", out_dtype=out)["w"]
        assert got.dtype == getattr(torch, out)
        assert torch.equal(got.float(), expected.to(got.dtype).float()), mixture


def test_common_type_of_a_mixture(tmp_path):
    """fp8 never decides where a wider type is; two fp8 types meet in bf16, the two halves in fp32."""
    expected = {
        ("float8_e4m3fn", "float8_e4m3fn"): "F8_E4M3",
        ("float8_e4m3fn", "float8_e5m2"): "BF16",
        ("float8_e4m3fn", "float16"): "F16",
        ("float8_e5m2", "float32"): "F32",
        ("bfloat16", "float16"): "F32",
    }
    for names, code in expected.items():
        for i, name in enumerate(names):
            save_file({"w": torch.randn(8, 8).to(getattr(torch, name))}, tmp_path / f"{i}.safetensors")
        paths = [tmp_path / "0.safetensors", tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
        assert code_of(merged("linear", paths, tmp_path / "out.safetensors")["w"].dtype) == code


def test_overflow_of_fp8(tmp_path):
    """e5m2 has infinities, and a result beyond its largest number is an error. e4m3fn has none: torch rounds to NaN or, in recent
    versions, to its largest number, 448."""
    for i in range(3):
        save_file({"w": torch.full((4, 4), 5e4 * i)}, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    with pytest.raises(pymerge.checkpoint.merge.MergeError, match="overflow float8_e5m2; choose another out_dtype"):
        merged("linear", paths, tmp_path / "out.safetensors", out_dtype="float8_e5m2")
    assert not (tmp_path / "out.safetensors").exists()
    try:
        got = merged("linear", paths, tmp_path / "out.safetensors", out_dtype="float8_e4m3fn")
    except pymerge.checkpoint.merge.MergeError:
        return
    assert got["w"].float().eq(448).all()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)},
            "'a.weight' is scaled fp8, by 'a.weight_scale'",
        ),
        ({"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1)}, "scaled fp8"),
        ({"a.qweight": torch.ones(4, 4, dtype=torch.int32), "a.scales": torch.ones(1)}, "it has 'a.qweight'"),
        ({"scaled_fp8": torch.ones(2).to(torch.float8_e4m3fn)}, "it has 'scaled_fp8'"),
    ],
)
def test_scaled_codes_are_refused(tmp_path, tensors, message):
    for i in range(2):
        save_file(tensors, tmp_path / f"{i}.safetensors")
    with pytest.raises(RecipeError, match=f"is quantised .*{message}.*dequantise it first"):
        merged("linear", [tmp_path / "0.safetensors"] * 2 + [tmp_path / "1.safetensors"], tmp_path / "out.safetensors")


def test_plain_fp8_with_a_parameter_called_scale_is_fine(tmp_path):
    for i in range(2):
        save_file({"norm.weight": torch.ones(4), "norm.weight_scale": torch.ones(4)}, tmp_path / f"{i}.safetensors")
    merged("linear", [tmp_path / "0.safetensors"] * 2 + [tmp_path / "1.safetensors"], tmp_path / "out.safetensors")


UNET = {
    "conv_in.weight": (16, 4, 3, 3),
    "time_embedding.linear_1.weight": (64, 16),
    "down_blocks.0.resnets.0.norm1.weight": (16,),
    "down_blocks.0.resnets.0.conv1.weight": (16, 16, 3, 3),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (16, 24),
    "mid_block.resnets.1.conv2.bias": (16,),
    "up_blocks.3.upsamplers.0.conv.weight": (16, 16, 1, 1),
    "conv_out.bias": (4,),
    "alphas_cumprod": (10,),
}
VIT = {
    "vit.embeddings.cls_token": (1, 1, 8),
    "vit.embeddings.position_embeddings": (1, 17, 8),
    "vit.embeddings.patch_embeddings.projection.weight": (8, 3, 4, 4),
    "vit.encoder.layer.0.attention.attention.query.weight": (8, 8),
    "vit.encoder.layer.1.output.dense.bias": (8,),
    "vit.layernorm.weight": (8,),
    "classifier.weight": (3, 8),
    "logit_scale": (),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shapes", [UNET, VIT], ids=["unet", "vit"])
def test_other_architectures(tmp_path, shapes, method):
    """Every tensor merged as the Python API merges it, whatever its name, rank or integer buffers."""
    models = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=g).half() for name, shape in shapes.items()}
        tensors["position_ids"] = torch.arange(17)
        models.append(tensors)
        save_model(tmp_path / str(seed), tensors)
    pymerge.merge(recipe(method, [tmp_path / str(seed) for seed in range(3)]), tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    with pymerge.backend("reference"):
        base, tuned = models[0], models[1:]
        expected = {
            "linear": lambda: pymerge.linear(tuned, weights=0.5),
            "ties": lambda: pymerge.ties(base, tuned, density=0.5, convention="mergekit"),
            "task_arithmetic": lambda: pymerge.task_arithmetic(base, tuned, 0.25),
            "dare_linear": lambda: pymerge.dare_linear(base, tuned, weights=0.5, density=0.5, seed=1, convention="mergekit"),
            "dare_ties": lambda: pymerge.dare_ties(base, tuned, weights=0.5, density=0.5, convention="mergekit"),
            "slerp": lambda: pymerge.slerp(base, tuned[0], t=0.3),
        }[method]()
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)
