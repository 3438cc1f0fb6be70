"""Several recipes in one file: their order, and what cannot be ordered."""

import pytest

from pymerge.recipe import RecipeError, read_sources
from pymerge.recipe.documents import order_documents


def ordered(tmp_path, *documents):
    path = tmp_path / "many.yml"
    path.write_text("\n---\n".join(f"merge_method: linear\n{document}" for document in documents) + "\n---\n")
    return order_documents(read_sources(path))


def one(name, *models, more=""):
    return (f"name: {name}\n" if name else "") + "models:\n" + "\n".join(f"- model: {m}" for m in models) + more


def test_after_what_they_use(tmp_path):
    found = ordered(tmp_path, one("", "c", "b"), one("b", "x", "a+lora"), one("a", "y"), one("c", "z@v1"), one("d", "c@v1"))
    assert [document.name for document in found] == ["a", "b", "c", "merged", "d"]
    assert [document.uses for document in found] == [(), ("a",), (), ("c", "b"), ()]


def test_every_place_that_names_a_model_counts(tmp_path):
    last = "merge_method: ties\nbase_model: a\nslices: [{sources: [{model: b, layer_range: [0, 1]}], base_model: c}]\ntokenizer_source: d"
    found = ordered(tmp_path, last.removeprefix("merge_method: ties\n"), *(one(name, "x") for name in "abcd"))
    assert found[-1].uses == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ((one("a", "b"), one("b", "c"), one("c", "b")), "uses itself: 'b' uses 'c', 'c' uses 'b'"),
        ((one("a", "a"), one("b", "x")), "uses itself: 'a' uses 'a'"),
        ((one("a", "x"), one("a", "y")), "two recipes of the file are called 'a'; give this one another name"),
        ((one("", "x"), one("", "y")), "two recipes of the file are called 'merged' (it has no name); give this one another name"),
        ((one("a", "x"), one("b", "y", more="\nfoo: 1")), ":10: foo: unknown key"),
    ],
)
def test_mistakes(tmp_path, documents, message):
    with pytest.raises(RecipeError) as caught:
        ordered(tmp_path, *documents)
    assert message in str(caught.value)
