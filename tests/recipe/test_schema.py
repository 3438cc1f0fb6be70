"""Reading recipes: every mistake has its line and place, all are told at once, and misspelt keys come with the right one."""

import json

import pytest

from pymerge.recipe import RecipeError, load_recipe

GOOD = """\
merge_method: ties
base_model: ./base
models:
  - model: ./a
    parameters: {weight: 1}
  - model: ./b
parameters:
  density: [0.2, 0.5]
  lambda: 1e-1
dtype: torch.float32
out_dtype: bfloat16
"""


# Each list holds the one before ten times.
LAUGHS = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 10) + "]\n" for i in range(1, 9))


def problems_of(text, tmp_path, name="r.yml"):
    path = tmp_path / name
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    found = [str(problem).removeprefix(f"{path}") for problem in caught.value.problems]
    assert all(str(problem).startswith(str(path)) for problem in caught.value.problems)
    return found


def test_good(tmp_path):
    (tmp_path / "r.yml").write_text(GOOD)
    recipe = load_recipe(tmp_path / "r.yml")
    assert recipe.merge_method == "ties" and str(recipe.base_model) == "./base" and recipe.folder == tmp_path
    assert [str(m.model) for m in recipe.models] == ["./a", "./b"]
    assert recipe.models[0].parameters == {"weight": 1}
    assert (recipe.dtype, recipe.out_dtype) == ("F32", "BF16")


def test_same_from_yaml_json_and_mapping(tmp_path):
    (tmp_path / "r.yml").write_text(GOOD)
    recipe = load_recipe(tmp_path / "r.yml")
    (tmp_path / "r.json").write_text(json.dumps(recipe.to_dict(), indent="\t"))
    assert load_recipe(tmp_path / "r.json") == recipe
    assert load_recipe(recipe.to_dict()) == recipe.replace(folder=None)
    (tmp_path / "again.yml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yml") == recipe
    assert load_recipe(tmp_path / "again.yml").to_yaml() == recipe.to_yaml()


def test_everything_at_once(tmp_path):
    text = """\
merge_metod: ties
base_model: [a]
models:
  - model: ./a
    parameter: {weight: 1}
  - modle: ./b
  - ./c
  - model: 7
dtype: bf16
slices: []
tokenizer_source: 3
chat_template: chatlm
missing_tensors: ignore
normalize: true
parameters: 3
"""
    assert problems_of(text, tmp_path) == [
        ":1: merge_metod: unknown key; did you mean 'merge_method'?",
        ":1: merge_method: is missing (`pymerge methods` lists them)",
        ":2: base_model: is a list; write the path of a checkpoint or a hub id",
        ":5: models[0].parameter: unknown key; did you mean 'parameters'?",
        ":6: models[1].modle: unknown key; did you mean 'model'?",
        ":6: models[1].model: is missing; write the path of a checkpoint",
        ":7: models[2]: is './c'; write '- model: PATH', and its parameters below",
        ":8: models[3].model: is 7; write the path of a checkpoint or a hub id",
        ":9: dtype: 'bf16' is not a dtype; did you mean 'bfloat16'?",
        ":10: slices: is given beside 'models'; a recipe has one of models, slices, modules",
        ":10: slices: is an empty list; write a list with an item '- sources: [...]' for each",
        ":11: tokenizer_source: is 3; write the path of a checkpoint or a hub id",
        ":12: chat_template: is 'chatlm'; did you mean 'chatml'?",
        ":13: missing_tensors: is 'ignore'; choose error, drop, keep, merge",
        ":14: normalize: unknown key; a recipe has merge_method, base_model, models, slices, modules, parameters, dtype, out_dtype, "
        "tokenizer_source, tokenizer, chat_template, missing_tensors, vocabulary, name",
        ":15: parameters: is 3; write a mapping of names to values",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": a recipe is a mapping with the keys merge_method"),
        ("- a\n", ":1: a recipe is a mapping"),
        ("a: [\n", ":2: is not valid YAML"),
        ("a:\n\t- b\n", ":2: is not valid YAML"),
        ("a: 1\n---\nb: 1\n", ": holds 2 recipes, and one is wanted here"),
        ("models: []\nmodels: []\n", ":2: key 'models' occurs twice"),
        ("a: &x [*x]\n", ":1: contains itself"),
        ("[a]: 1\n", ":1: has a key that is a list"),
        ("a: !!python/object/apply:os.system [ls]\n", ": models: is missing"),
        ("a: 2020-13-45\n", ": is not valid YAML"),
        ("[" * 20000, ": is nested too deep"),
        (b"\xff\xfe\x00", ": is not UTF-8"),
        (LAUGHS, ": has more than 200000 values"),
        (b"x" * 4_000_001, ": is 4000001 bytes long"),
    ],
)  # fmt: skip
def test_not_a_recipe(tmp_path, text, message):
    assert any(message in problem for problem in problems_of(text, tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n ]", ":2: is not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "an empty list"),
    ],
)
def test_bad_json(tmp_path, text, message):
    assert message in problems_of(text, tmp_path, "r.json")[0]


def test_unreadable(tmp_path):
    for path in (tmp_path / "none.yml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(path)
    with pytest.raises(TypeError, match="recipe is a int"):
        load_recipe(3)


def test_merge_keys_and_aliases(tmp_path):
    """YAML's own ways of not repeating oneself work, and an own key wins over a merged one."""
    (tmp_path / "r.yml").write_text(
        "merge_method: linear\nmodels:\n- model: a\n  parameters: &p {weight: 1}\n- {model: b, parameters: {<<: *p, weight: 2}}\n"
        "- {model: c, parameters: *p}\n"
    )
    recipe = load_recipe(tmp_path / "r.yml")
    assert [m.parameters["weight"] for m in recipe.models] == [1, 2, 1]
    assert "&" not in recipe.to_yaml()
