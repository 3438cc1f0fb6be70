"""`tokenizer` and `tokenizer_source` as a recipe writes them."""

import pytest

from pymerge.recipe import ModelReference, RecipeError, TokenizerSpec, TokenSpec, load_recipe

RECIPE = {"merge_method": "linear", "models": [{"model": "a"}]}


def spec(**given):
    return load_recipe({**RECIPE, **given}).tokenizer


def test_source():
    assert spec() is None
    assert spec(tokenizer_source="union") == TokenizerSpec("union")
    assert spec(tokenizer_source="base") == spec(tokenizer={"source": "base"}) == TokenizerSpec("base")
    assert spec(tokenizer={}) == TokenizerSpec("union")
    assert spec(tokenizer_source="org/m@v1") == TokenizerSpec("org/m@v1", model=ModelReference.of("org/m@v1"))


def test_tokens():
    tokens = {
        "<a>": {"source": "m"},
        "<b>": {"source": {"kind": "zero"}, "force": True},
        "<c>": {"source": {"kind": "model_token", "model": "m", "token": "<x>"}},
        "<d>": {"source": {"kind": "model_token", "model": {"model": {"path": "we+ird"}}, "token_id": 0}},
        "<e>": {},
        "<f>": {"source": {"model": {"path": "we+ird"}}},
    }
    found = spec(tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 64})
    m, weird = ModelReference.of("m"), ModelReference.of("we+ird")
    assert found.pad_to_multiple_of == 64
    assert found.tokens == {
        "<a>": TokenSpec("model", m),
        "<b>": TokenSpec("zero", force=True),
        "<c>": TokenSpec("token", m, token="<x>"),
        "<d>": TokenSpec("token", ModelReference(weird.model), token_id=0),
        "<e>": TokenSpec("model"),
        "<f>": TokenSpec("model", ModelReference(weird.model)),
    }
    assert spec(tokenizer=found.to_value()) == found
    assert len(found.references()) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": {}, "tokenizer_source": "base"}, "tokenizer_source: is given beside 'tokenizer'"),
        ({"tokenizer": "union"}, "tokenizer: is not a mapping"),
        ({"tokenizer": {"sorce": "base"}}, "tokenizer.sorce: unknown key; did you mean 'source'?"),
        ({"tokenizer": {"tokens": ["<a>"]}}, "tokenizer.tokens: is not a mapping"),
        ({"tokenizer": {"tokens": {"<a>": "m"}}}, "tokenizer.tokens.<a>: is not a mapping; write 'source'"),
        ({"tokenizer": {"tokens": {1: {}}}}, "tokenizer.tokens[1]: 1 is not a token; write text"),
        ({"tokenizer": {"tokens": {"a": {"force": 1}}}}, "tokenizer.tokens.a.force: is 1; write true or false"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "one"}}}}}, "tokenizer.tokens.a.source.kind: is 'one'; choose model_token or"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": "m"}}}}}, "tokenizer.tokens.a.source: needs either"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": "m", "token_id": -1}}}}},
            "tokenizer.tokens.a.source.token_id: is -1; write a whole number",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: is 0; write a whole number of at least 1"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(RecipeError) as caught:
        spec(**given)
    assert str(caught.value.problems[0]).startswith(f"recipe: {message}")
