"""Slices and modules: what they may look like, and what is said about those that are wrong."""

import pytest

from pymerge.recipe import ModelReference, Problems, RecipeError, Source, load_recipe, parse_recipe
from pymerge.recipe.modules import assign_modules

SLICES = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 3], "parameters": {"scale": 0.5}}]},
        {"sources": [{"model": "b", "layer_range": [1, 2]}], "base_model": "a", "parameters": {"scale": 2}},
    ],
}
MODULES = {
    "merge_method": "linear",
    "modules": {
        "vision_tower": {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}},
        "text_decoder": {"slices": SLICES["slices"]},
    },
}


@pytest.mark.parametrize("data", [SLICES, MODULES])
def test_written_as_read(data):
    recipe = load_recipe(data)
    assert recipe.to_dict() == data
    assert load_recipe(recipe.to_dict()) == recipe


def test_references_in_order_with_places():
    recipe = load_recipe({**MODULES, "base_model": "c", "tokenizer_source": "d"})
    assert [(".".join(map(str, place)), str(model)) for place, model in recipe.references()] == [
        ("base_model", "c"),
        ("modules.vision_tower.models.0.model", "a"),
        ("modules.vision_tower.models.1.model", "b"),
        ("modules.text_decoder.slices.0.sources.0.model", "a"),
        ("modules.text_decoder.slices.1.sources.0.model", "b"),
        ("modules.text_decoder.slices.1.base_model", "a"),
        ("tokenizer.source", "d"),
    ]


def source(**changes):
    return {"model": "a", "layer_range": [0, 2], **changes}


@pytest.mark.parametrize(
    ("parts", "messages"),
    [
        ({"slices": "x"}, ["slices: is 'x'; write a list with an item '- sources: [...]' for each"]),
        ({"slices": ["x"]}, ["slices[0]: is 'x'; write '- sources: [...]'"]),
        ({"slices": [{}]}, ["slices[0].sources: is empty; write a list with an item '- {model: PATH, layer_range: [0, 8]}' for each"]),
        ({"slices": [{"source": []}]}, ["slices[0].source: unknown key; did you mean 'sources'?", "slices[0].sources: is empty"]),
        ({"slices": [{"sources": [{"model": "a"}]}]}, ["slices[0].sources[0].layer_range: is missing; write [first layer, layer after"]),
        ({"slices": [{"sources": [source(layer_range=[2, 2])]}]}, ["slices[0].sources[0].layer_range: is [2, 2]; write [first layer"]),
        ({"slices": [{"sources": [source(layer_range=[-1, 2])]}]}, ["slices[0].sources[0].layer_range: is [-1, 2]"]),
        ({"slices": [{"sources": [source(layer_range=[0, True])]}]}, ["slices[0].sources[0].layer_range: is [0, True]"]),
        ({"slices": [{"sources": [source(layer_range="0-2")]}]}, ["slices[0].sources[0].layer_range: is '0-2'"]),
        ({"slices": [{"sources": [source(), source(layer_range=[0, 3])]}]}, ["slices[0].sources: have 2, 3 layers; all sources of"]),
        ({"models": [source()]}, ["models[0].layer_range: unknown key"]),
        ({"models": [{"model": "a"}], "slices": [{"sources": [source()]}]}, ["slices: is given beside 'models'; a recipe has one of"]),
        ({"modules": {}}, ["modules: is a mapping; write each module's name with its 'models' or 'slices' below it"]),
        ({"modules": {"x": None}}, ["modules.x: is empty; write the module's 'models' or 'slices' below its name"]),
        ({"modules": {"x": {"parameters": {}}}}, ["modules.x: has neither 'models' nor 'slices'; it needs one of them"]),
        ({"modules": {"x": {"models": [{"model": "a"}], "slices": [1]}}}, ["modules.x: has both 'models' and 'slices'; it needs one"]),
        ({"modules": {"x": {"models": [{"modle": "a"}]}}}, ["modules.x.models[0].modle: unknown", "modules.x.models[0].model: is"]),
        ({}, ["models: is missing; list the models to merge (or write 'slices' or 'modules')"]),
    ],
)  # fmt: skip
def test_mistakes(parts, messages):
    with pytest.raises(RecipeError) as caught:
        load_recipe({"merge_method": "linear", **parts})
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == len(messages)
    for problem, message in zip(found, messages, strict=True):
        assert problem.startswith(f"recipe: {message}")


def test_residual_weight_has_no_effect():
    problems = Problems()
    parse_recipe(Source("r", None, {**SLICES, "slices": [{"sources": [source()], "residual_weight": 0.5}]}), problems)
    assert not problems and "slices[0].residual_weight: has no effect" in problems.warnings[0]


def assigned(modules, names):
    problems = Problems()
    return assign_modules(modules, names, "m", problems), [str(problem) for problem in problems.found()]


LLAVA = [
    "language_model.model.embed_tokens.weight", "language_model.model.layers.0.w", "language_model.lm_head.weight",
    "vision_tower.vision_model.encoder.layers.0.w", "multi_modal_projector.linear_1.weight",
]  # fmt: skip
QWEN2_VL = ["model.embed_tokens.weight", "model.layers.0.w", "lm_head.weight", "visual.blocks.0.w", "visual.merger.mlp.0.weight"]
QWEN3_VL = [
    "model.language_model.layers.0.w", "lm_head.weight", "model.visual.blocks.0.w", "model.visual.merger.norm.weight",
    "model.visual.deepstack_merger_list.0.norm.weight",
]  # fmt: skip
T5 = ["shared.weight", "encoder.block.0.w", "decoder.block.0.w", "lm_head.weight"]
USUAL = ["text_decoder", "vision_tower", "multi_modal_projector"]


@pytest.mark.parametrize(
    ("modules", "names", "expected"),
    [
        (USUAL, LLAVA, [0, 0, 0, 1, 2]),
        (USUAL, QWEN2_VL, [0, 0, 0, 1, 2]),
        (USUAL, QWEN3_VL, [0, 0, 1, 2, 2]),
        (["text_decoder", "vision_tower"], QWEN2_VL, [0, 0, 0, 1, 1]),
        (["visual", "default"], QWEN2_VL, [1, 1, 1, 0, 0]),
        (["visual", "visual.merger", "default"], QWEN2_VL, [2, 2, 2, 0, 1]),
        (["default"], LLAVA, [0, 0, 0, 0, 0]),
        (["encoder", "decoder", "shared", "lm_head"], T5, [2, 0, 1, 3]),
        (["encoder", "decoder", "default"], [f"model.{name}" for name in T5], [2, 0, 1, 2]),
    ],
)
def test_modules_by_prefix(modules, names, expected):
    assert assigned(modules, names) == ({name: modules[i] for name, i in zip(names, expected, strict=True)}, [])


def test_modules_that_do_not_fit():
    _, found = assigned(["encoder", "decodr", "shared"], T5)
    assert found == [
        "recipe: modules.decodr: no tensor of m belongs to it; a module is named by the beginning of its tensors' names "
        "(shared, encoder, decoder, lm_head); stacks of layers: encoder.block (1), decoder.block (1)"
    ]
    _, found = assigned(["encoder", "decoder"], T5)
    assert found == ["recipe: modules: have no place for 'shared.weight' and 1 more of m; add a module for them, or one called default"]


def test_name_of_a_merge():
    recipe = {"merge_method": "linear", "models": [{"model": "a"}]}
    assert load_recipe({**recipe, "name": "stage 1.b"}).name == "stage 1.b"
    for name in ("..", "a/b", "", "x.safetensors", 3, "a\n", "-x", "x."):
        with pytest.raises(RecipeError, match="it becomes the name of a folder"):
            load_recipe({**recipe, "name": name})


def test_models_are_references():
    assert load_recipe({"merge_method": "linear", "models": [{"model": "a+b"}]}).models[0].model == ModelReference.of("a+b")
