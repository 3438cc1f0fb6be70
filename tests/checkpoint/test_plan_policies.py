"""Models that differ: what a recipe may say about missing tensors and vocabularies, and heads that are tied to embeddings."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.plan import make_plan
from pymerge.recipe import RecipeError

from .files import save_model, tensors_of

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(*models, method="linear", **more):
    return {"merge_method": method, "models": [{"model": m} for m in models], "parameters": {"weight": 1}, **more}


def problems_of(recipe):
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe)
    return [str(problem).removeprefix("recipe: ") for problem in caught.value.problems]


def outputs(recipe):
    with make_plan(recipe) as plan:
        return {t.output.name: [plan.names[i] for i, _ in t.inputs] for t in plan.tensors}


@pytest.fixture
def unequal(here):
    """a, b, c have x; a and b have y; c alone has z."""
    g = torch.Generator().manual_seed(0)
    for name, names in (("a", "xy"), ("b", "xy"), ("c", "xz")):
        save_model(here / name, {n: torch.randn(8, generator=g) for n in names})


def test_missing_tensors_are_an_error(unequal):
    assert problems_of(recipe_of("a", "b", "c")) == [
        "models[2].model: c lacks 1 tensor ('y') that a has; the recipe's 'missing_tensors' can say what to do",
        "models[2].model: c has 1 tensor ('z') that a lacks",
    ]


@pytest.mark.parametrize(
    ("policy", "method", "expected"),
    [
        ("drop", "linear", {"x": ["a", "b", "c"]}),
        ("keep", "linear", {"x": ["a", "b", "c"], "y": ["a"], "z": ["c"]}),
        ("merge", "linear", {"x": ["a", "b", "c"], "y": ["a", "b"], "z": ["c"]}),
        ("merge", "task_arithmetic", {"x": ["a", "b", "c"], "y": ["a", "b"], "z": ["c"]}),
    ],
)
def test_missing_tensors(unequal, policy, method, expected):
    base = {"base_model": "a"} if method == "task_arithmetic" else {}
    recipe = recipe_of("a", "b", "c", method=method, missing_tensors=policy, **base)
    assert outputs(recipe) == expected
    merge(recipe, "out")
    out = load_file("out/model.safetensors")
    a, b, c = (load_file(f"{name}/model.safetensors") for name in "abc")
    assert out.keys() == expected.keys()
    if policy == "keep":
        assert torch.equal(out["y"], a["y"]) and torch.equal(out["z"], c["z"])
    if policy == "merge":
        torch.testing.assert_close(out["y"], (a["y"] + b["y"]) / 2 if method == "linear" else b["y"])
        torch.testing.assert_close(out["z"], c["z"])


def test_parameters_of_the_models_that_have_a_tensor(unequal):
    recipe = recipe_of("a", "b", "c", missing_tensors="merge", parameters={})
    for entry, weight in zip(recipe["models"], (1, 3, 7), strict=True):
        entry["parameters"] = {"weight": weight}
    with make_plan(recipe) as plan:
        assert {t.output.name: t.parameters["weights"] for t in plan.tensors} == {"x": (1.0, 3.0, 7.0), "y": (1.0, 3.0), "z": (7.0,)}


def test_vocabulary(here):
    tensors = [tensors_of(i) for i in range(2)]
    for name in (HEAD, EMBEDDING):
        tensors[1][name] = torch.randn(44, 16)
    save_model(here / "a", tensors[0], vocab_size=40)
    save_model(here / "b", tensors[1], vocab_size=44)
    assert "'tokenizer_source' matches tokens, 'vocabulary" in problems_of(recipe_of("a", "b"))[0]
    merge(recipe_of("b", "a", vocabulary="crop"), "out")
    out = load_file("out/model.safetensors")
    torch.testing.assert_close(out[HEAD], (tensors[0][HEAD] + tensors[1][HEAD][:40]) / 2)
    assert json.loads(open("out/config.json").read())["vocab_size"] == 40
    for other in ("model.layers.0.mlp.up_proj.weight", "model.embed_positions.weight"):
        tensors[0][other], tensors[1][other] = torch.randn(41, 16), torch.randn(40, 16)
        save_model(here / "a", tensors[0])
        save_model(here / "b", tensors[1])
        assert f"{other!r} is [40, 16] in b and [41, 16] in a" in " ".join(problems_of(recipe_of("a", "b", vocabulary="crop")))


def test_nothing_in_common(here):
    save_model(here / "a", {"x": torch.ones(2)})
    save_model(here / "b", {"y": torch.ones(2)})
    assert problems_of(recipe_of("a", "b", missing_tensors="drop")) == [
        "missing_tensors: leaves no tensor: there is none that all models have"
    ]


def test_chat_template_of_a_single_file(here):
    save_model(here / "a", tensors_of(0))
    with make_plan(recipe_of("a", chat_template="chatml"), "out.safetensors") as plan:
        assert "has no effect: the output is one file" in plan.warnings[0]


def tied_model(folder, seed, head, **config):
    tensors = tensors_of(seed)
    if head == "same":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    elif head is None:
        del tensors[HEAD]
    save_model(folder, tensors, **config)
    return tensors


def test_a_tied_head_is_written_once(here):
    for seed, name in enumerate("ab"):
        tied_model(here / name, seed, "same", tie_word_embeddings=True)
    tied_model(here / "c", 2, None, tie_word_embeddings=True)
    with make_plan(recipe_of("a", "b", "c")) as plan:
        assert HEAD not in {t.output.name for t in plan.tensors} and plan.changes.config == {}
        assert plan.warnings == ("lm_head.weight of a and b is tied to the embeddings (by config.json) and is not written a second time",)
    tied_model(here / "d", 2, None)
    assert HEAD not in outputs(recipe_of("c", "d"))


def test_tied_and_untied(here):
    """The tied model's head is its embeddings, and the result has a head of its own."""
    a = tied_model(here / "a", 0, None, tie_word_embeddings=True)
    b = tied_model(here / "b", 1, "own", tie_word_embeddings=False)
    merge(recipe_of("a", "b"), "out")
    out = load_file("out/model.safetensors")
    torch.testing.assert_close(out[HEAD], (a[EMBEDDING] + b[HEAD]) / 2)
    assert json.loads(open("out/config.json").read())["tie_word_embeddings"] is False
    tied_model(here / "c", 2, None, tie_word_embeddings=False)  # a model without any head, such as a reward model's trunk
    assert "c lacks 1 tensor ('lm_head.weight') that b has" in problems_of(recipe_of("b", "c"))[0]


def test_chat_template(here):
    for i, (name, template) in enumerate((("a", "{{ A }}"), ("b", "{{ B }}\n"), ("c", "{{ B }}"), ("d", None))):
        save_model(here / name, tensors_of(i))
        if template:
            (here / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "model_max_length": 7}))
    (here / "b/tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "x", "template": "X"}, {"name": "default", "template": "{{ B }}"}]}'
    )
    (here / "c/tokenizer_config.json").unlink()
    (here / "c/chat_template.jinja").write_text("{{ B }}\n")
    models = ("a", "b", "c", "d")
    for given, expected in (("auto", "{{ B }}"), ("{{ own }}", "{{ own }}"), ("chatml", "<|im_start|>")):
        merge(recipe_of(*models, chat_template=given), "out", force=True)
        text = (here / "out/chat_template.jinja").read_text()
        assert expected in text
        assert json.loads((here / "out/tokenizer_config.json").read_text()) == {"chat_template": text, "model_max_length": 7}
    with make_plan(recipe_of("d", chat_template="auto")) as plan:
        assert "no model has a chat template" in plan.warnings[0]
    (here / "b/tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is not valid JSON" in problems_of(recipe_of(*models, chat_template="auto"))[0]


def test_tokenizer_needs_its_machinery_or_works(here):
    """Until vocabularies can be aligned, a recipe that asks for it must not be carried out as if it did not."""
    save_model(here / "a", tensors_of(0))
    assert "tokenizer" in problems_of(recipe_of("a", tokenizer_source="union"))[0]
