"""Whatever a recipe says: it is understood, or there is a RecipeError with its place; what is understood is written and read alike."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge.checkpoint.plan import make_plan
from pymerge.recipe import Problems, RecipeError, Source, load_recipe, parse_recipe
from pymerge.recipe.schema import KEYS

WORDS = (*KEYS, "model", "path", "revision", "lora", "sources", "layer_range", "filter", "value", "weight", "tokens", "source", "kind")
TEXTS = st.sampled_from(
    ("linear", "ties", "a", "./b+c@d", "a@", "union", "auto", "chatml", "{{x}}", "zero", "model_token", "\0", "\ud800", "../..")
)
LEAVES = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | TEXTS | st.text(max_size=4)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=4)
)
MODELS = TEXTS | st.fixed_dictionaries({"model": TEXTS | st.fixed_dictionaries({"path": TEXTS})}, optional={"lora": TEXTS})
ENTRIES = st.fixed_dictionaries(
    {"model": MODELS}, optional={"parameters": st.dictionaries(st.sampled_from(("weight", "x")), VALUES, max_size=2)}
)
RANGES = st.tuples(st.integers(0, 3), st.integers(1, 5)).map(list)
SLICES = st.fixed_dictionaries(
    {"sources": st.lists(st.tuples(ENTRIES, RANGES).map(lambda both: {**both[0], "layer_range": both[1]}), min_size=1, max_size=2)}
)
RECIPES = st.fixed_dictionaries(
    {"merge_method": TEXTS},
    optional={
        "models": st.lists(ENTRIES, max_size=3), "slices": st.lists(SLICES, max_size=2), "base_model": MODELS,
        **{key: VALUES for key in KEYS if key not in ("merge_method", "models", "slices", "base_model")},
    },
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.one_of(RECIPES, RECIPES, VALUES))
def test_understood_or_refused(data):
    problems = Problems()
    recipe = parse_recipe(Source("recipe", None, data), problems)
    if problems:
        for problem in problems.found():
            assert problem.message and "\n" not in problem.place
        return
    again = load_recipe(recipe.to_dict())
    assert json.dumps(again.to_dict()) == json.dumps(recipe.to_dict())
    assert len(again.references()) == len(recipe.references())


@settings(max_examples=40, deadline=None)
@given(RECIPES)
def test_planning_refuses_with_places(data):
    """None of the models exist, so there is no plan; but every mistake is told and nothing else is raised."""
    try:
        make_plan(data).close()
    except RecipeError as error:
        assert error.problems
    else:
        raise AssertionError("there are no such models")
