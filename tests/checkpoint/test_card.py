"""The model card: front matter that the hub can read, tables that stay tables, the recipe as it is."""

import yaml

from pymerge.checkpoint.extras import CardInput, model_card
from pymerge.recipe import load_recipe

RECIPE = {
    "merge_method": "task_arithmetic", "base_model": "org/base-7B", "models": [{"model": "./a|b`c"}], "parameters": {"weight": 1.0},
}  # fmt: skip
INPUTS = (
    CardInput("org/base-7B", True, 2_000_000, ("BF16",), (("model.safetensors", "ab" * 32),)),
    CardInput("./a|b`c\n# no heading", False, 1000, ("BF16", "F32")),
)


def test_card():
    text = model_card(load_recipe(RECIPE), "two\nlines", INPUTS, True)
    assert text == model_card(load_recipe(RECIPE), "two\nlines", INPUTS, True)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "base_model": ["org/base-7B"], "base_model_relation": "merge", "tags": ["merge", "pymerge"],
    }  # fmt: skip
    lines = body.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# two lines", "## Recipe", "## Do it again"]
    assert "| `org/base-7B` | base | 2 MB | BF16 |" in lines
    assert r"| `` ./a\|b`c # no heading `` |  | 1 kB | BF16, F32 |" in lines
    assert f"| `org/base-7B` | `model.safetensors` | `{'ab' * 32}` |" in lines
    recipe = body.split("```yaml\n")[1].split("\n```")[0]
    assert load_recipe(yaml.safe_load(recipe)).to_yaml() == load_recipe(RECIPE).to_yaml()


def test_paths_are_no_models_of_the_hub():
    front = model_card(load_recipe(RECIPE), "x", INPUTS[1:], False).split("---\n")[1]
    assert yaml.safe_load(front) == {"tags": ["merge", "pymerge"]}
