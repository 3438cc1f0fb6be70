"""Layers put together anew: where every tensor comes from, with which parameters, and what config.json says afterwards."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.plan import make_plan
from pymerge.recipe import RecipeError

from .files import save_model, tensors_of


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_model(tmp_path / name, tensors_of(seed), num_hidden_layers=3, layer_types=[f"{name}{i}" for i in range(3)])
    return tmp_path


def piece(*sources, **more):
    return {"sources": [{"model": m, "layer_range": [first, last], **p} for m, first, last, *rest in sources for p in rest or [{}]], **more}


def passthrough(*pieces, **more):
    return {"merge_method": "passthrough", "slices": list(pieces), **more}


def origins(plan):
    return {t.output.name: [(plan.names[i], info.name) for i, info in t.inputs] for t in plan.tensors}


def problems_of(recipe, out="out"):
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe, out)
    return [str(problem).removeprefix("recipe: ") for problem in caught.value.problems]


def test_where_tensors_come_from():
    with make_plan(passthrough(piece(("a", 0, 2)), piece(("b", 1, 3)), piece(("a", 2, 3)))) as plan:
        found = origins(plan)
    assert found["model.embed_tokens.weight"] == [("a", "model.embed_tokens.weight")]
    assert found["model.norm.weight"] == [("a", "model.norm.weight")]
    layers = [found[f"model.layers.{i}.mlp.up_proj.weight"][0] for i in range(5)]
    assert layers == [(m, f"model.layers.{i}.mlp.up_proj.weight") for m, i in [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]]
    assert len(found) == 3 + 5 * 3 and plan.changes.config[("num_hidden_layers",)] == 5
    assert plan.changes.config[("layer_types",)] == ["a0", "a1", "b1", "b2", "a2"]
    with make_plan(passthrough(piece(("a", 0, 2)), piece(("b", 1, 3)))) as plan:
        ends = {name: origin[0][0] for name, origin in origins(plan).items() if ".layers." not in name}
    assert ends == {"model.embed_tokens.weight": "a", "model.norm.weight": "b", "lm_head.weight": "b"}


def test_results_and_config():
    merge(passthrough(piece(("b", 2, 3, {"parameters": {"scale": 2}})), piece(("a", 0, 3))), "out")
    out, a, b = load_file("out/model.safetensors"), tensors_of(0), tensors_of(1)
    torch.testing.assert_close(out["model.layers.0.mlp.up_proj.weight"], 2 * b["model.layers.2.mlp.up_proj.weight"], rtol=0, atol=0)
    torch.testing.assert_close(out["model.layers.3.mlp.up_proj.weight"], a["model.layers.2.mlp.up_proj.weight"], rtol=0, atol=0)
    torch.testing.assert_close(out["model.embed_tokens.weight"], 2 * b["model.embed_tokens.weight"], rtol=0, atol=0)
    config = json.loads(open("out/config.json").read())
    assert config["num_hidden_layers"] == 4 and config["layer_types"] == ["b2", "a0", "a1", "a2"]


def test_gradients_run_over_the_slice_and_filters_see_the_own_name():
    weight = [{"filter": "layers.1.self_attn", "value": 9}, {"filter": "mlp", "value": [1, 2]}, {"value": 2}]
    lonely = {"parameters": {"weight": [3, 4]}}
    recipe = {
        "merge_method": "linear", "parameters": {"weight": weight},
        "slices": [piece(("a", 0, 3), ("b", 0, 3)), piece(("a", 1, 2), ("b", 2, 3, lonely))],
    }  # fmt: skip
    with make_plan(recipe) as plan:
        values = {t.output.name: t.parameters["weights"] for t in plan.tensors}
    assert [values[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)] == [(1.0, 1.0), (1.5, 1.5), (2.0, 2.0), (2.0, 4.0)]
    assert values["model.layers.1.self_attn.q_proj.weight"] == (9.0, 9.0)
    assert values["model.layers.3.self_attn.q_proj.weight"] == (9.0, 4.0)  # layer 1 in a, layer 3 in the output
    assert values["model.embed_tokens.weight"] == (2.0, 2.0)
    assert values["lm_head.weight"] == (2.0, 3.0)  # a gradient's beginning, although the slice has one layer


def test_precedence_source_slice_module_global():
    def weights(source=None, of_slice=None, of_module=None, of_all=None):
        def given(value):
            return {} if value is None else {"parameters": {"weight": value}}

        part = piece(("a", 0, 3, given(source)), **given(of_slice))
        recipe = {"merge_method": "linear", "modules": {"default": {"slices": [part], **given(of_module)}}, **given(of_all)}
        with make_plan(recipe) as plan:
            return plan.tensors[0].parameters["weights"]

    assert weights(1, 2, 3, 4) == (1.0,)
    assert weights(None, 2, 3, 4) == (2.0,)
    assert weights(None, None, 3, 4) == (3.0,)
    assert weights(None, None, None, 4) == (4.0,)
    assert weights([{"filter": "nowhere", "value": 1}], None, 3) == (3.0,)


def test_base_of_a_slice():
    ties = {"merge_method": "ties", "base_model": "a", "parameters": {"weight": 1, "density": 0.5}}
    with make_plan({**ties, "slices": [piece(("b", 1, 3), ("a", 0, 2))]}) as plan:
        layer = next(t for t in plan.tensors if t.output.name == "model.layers.1.mlp.up_proj.weight")
        assert layer.has_base and plan.bases == {0}
        assert [(plan.names[i], info.name) for i, info in layer.inputs] == [
            ("a", "model.layers.1.mlp.up_proj.weight"), ("b", "model.layers.2.mlp.up_proj.weight"),
        ]  # fmt: skip
    own = {**ties, "slices": [piece(("b", 1, 3), ("a", 0, 2), base_model="b")]}
    with make_plan(own) as plan:
        assert plan.bases == {1} and plan.donor.name == "a"
    assert problems_of({**ties, "slices": [piece(("b", 1, 3))]}) == [
        "slices[0].sources: do not have the base model, a; list it with the layer_range that the others' deltas are from"
    ]


def test_layers_of_one_model_merged_with_each_other():
    """mergekit drops all but the last of several sources that are one model."""
    recipe = {"merge_method": "linear", "slices": [piece(("a", 0, 2), ("a", 1, 3))], "parameters": {"weight": 0.5}}
    merge(recipe, "out")
    out, a = load_file("out/model.safetensors"), tensors_of(0)
    for i in range(2):
        name = "model.layers.{}.self_attn.q_proj.weight"
        torch.testing.assert_close(out[name.format(i)], (a[name.format(i)] + a[name.format(i + 1)]) / 2)
    ties = {"merge_method": "task_arithmetic", "base_model": "a", "parameters": {"weight": 1}}
    merge({**ties, "slices": [piece(("a", 0, 2), ("a", 1, 3))]}, "delta")
    assert torch.equal(load_file("delta/model.safetensors")["model.norm.weight"], a["model.norm.weight"])
    torch.testing.assert_close(load_file("delta/model.safetensors")[name.format(0)], a[name.format(1)], rtol=1e-5, atol=1e-6)


def test_mistakes(here):
    assert problems_of(passthrough(piece(("a", 0, 4)))) == [
        "slices[0].sources[0].layer_range: is [0, 4], and a has 3 layers (model.layers.0 to model.layers.2)"
    ]
    assert "slices[0].sources: 'passthrough' takes exactly 1 model; 2 given" in problems_of(passthrough(piece(("a", 0, 1), ("b", 0, 1))))
    save_model(here / "flat", {"w": torch.ones(2)})
    assert problems_of(passthrough(piece(("flat", 0, 1)))) == ["slices: flat has no numbered layers"]
    two = {f"{tower}.layers.{i}.w": torch.ones(2) for tower in ("text", "vision") for i in range(2)}
    save_model(here / "two", two)
    assert problems_of(passthrough(piece(("two", 0, 1)))) == [
        "slices: two has several stacks of layers: text.layers (2 layers), vision.layers (2 layers); say which is cut, under 'modules'"
    ]
    save_model(here / "gpt", {f"h.{i}.w": torch.ones(2) for i in range(3)})
    found = problems_of(passthrough(piece(("a", 0, 1)), piece(("gpt", 0, 1))))
    assert found[0] == "slices[1].sources[0].model: the layers of gpt are called h.N, those of the models before it model.layers.N"
    save_model(here / "c", tensors_of(0), num_hidden_layers=7)
    assert "config.json has no key with the number of layers of model.layers, which is 3; 2 cannot be set" in problems_of(
        passthrough(piece(("c", 0, 2)))
    )[0]  # fmt: skip
    save_model(here / "d", tensors_of(0), num_hidden_layers=3)
    lists = problems_of(passthrough(piece(("a", 0, 2)), piece(("d", 0, 2))))
    assert "config.json has a list 'layer_types' with an item per layer, which that of another slice's model lacks" in lists[0]


def test_tensors_of_unknown_side_are_told(here):
    tensors = {**tensors_of(2), "model.extra_thing": torch.ones(3)}
    save_model(here / "c", tensors, num_hidden_layers=3)
    with make_plan(passthrough(piece(("c", 0, 1)), piece(("c", 1, 3)))) as plan:
        assert "'model.extra_thing'; taken with the last slice" in plan.warnings[0]
    with make_plan(passthrough(piece(("c", 0, 2)))) as plan:
        assert not plan.warnings and "model.extra_thing" in origins(plan)


VLM = {
    "architectures": ["X"], "text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3, "depth": 1},
}  # fmt: skip


def save_vlm(folder, seed):
    tensors = {f"language_model.{name}": t for name, t in tensors_of(seed).items()}
    g = torch.Generator().manual_seed(seed)
    tensors |= {f"vision_tower.encoder.layers.{i}.w": torch.randn(4, generator=g) for i in range(3)}
    tensors |= {"vision_tower.patch_embed.weight": torch.randn(4, generator=g), "multi_modal_projector.w": torch.randn(4, generator=g)}
    save_model(folder, tensors, **VLM)
    return tensors


def test_modules(here):
    one, two = save_vlm(here / "one", 0), save_vlm(here / "two", 1)
    whole = [{"model": "one"}, {"model": "two"}]
    recipe = {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {"slices": [piece(("one", 0, 3)), piece(("two", 1, 3))], "parameters": {"weight": 1}},
            "vision_tower": {"models": whole, "parameters": {"weight": [1, 0], "normalize": False}},
            "default": {"models": whole[:1], "parameters": {"weight": 1}},
        },
    }
    merge(recipe, "out")
    out = load_file("out/model.safetensors")
    assert torch.equal(out["multi_modal_projector.w"], one["multi_modal_projector.w"])
    assert torch.equal(
        out["vision_tower.patch_embed.weight"], one["vision_tower.patch_embed.weight"] + two["vision_tower.patch_embed.weight"]
    )
    last = "vision_tower.encoder.layers.2.w"
    assert torch.equal(out[last], torch.zeros(4))
    name = "language_model.model.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(out[name(3)], two[name(1)]) and name(5) not in out
    assert torch.equal(out["language_model.lm_head.weight"], two["language_model.lm_head.weight"])
    config = json.loads(open("out/config.json").read())
    assert config["text_config"]["num_hidden_layers"] == 5 and config["vision_config"]["num_hidden_layers"] == 3


def test_encoder_and_decoder(here):
    tensors = {f"{side}.block.{i}.w": torch.ones(2) for side in ("encoder", "decoder") for i in range(2)} | {"shared.weight": torch.ones(3)}
    save_model(here / "t5", tensors, num_layers=2, num_decoder_layers=2)
    modules = {
        "shared": {"models": [{"model": "t5"}]},
        "encoder": {"models": [{"model": "t5"}]},
        "decoder": {"slices": [piece(("t5", 0, 2)), piece(("t5", 1, 2))]},
    }
    with make_plan({"merge_method": "passthrough", "modules": modules}) as plan:
        assert plan.changes.config == {("num_decoder_layers",): 3}
        assert origins(plan)["decoder.block.2.w"] == [("t5", "decoder.block.1.w")]
    swapped = {**modules, "encoder": modules["decoder"], "decoder": modules["encoder"]}
    with make_plan({"merge_method": "passthrough", "modules": swapped}) as plan:
        assert plan.changes.config == {("num_layers",): 3} and plan.bytes_written == 4 * (3 + 2 * 5)
