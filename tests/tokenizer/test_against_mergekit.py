"""The same recipe through mergekit and through pymerge, on tiny Llamas with different vocabularies: the same row for every token."""

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.merge import merge
from tests.mergekit_run import merged_by_mergekit

pytest.importorskip("mergekit")
transformers = pytest.importorskip("transformers")

from .files import save_llama, save_tokenizer  # noqa: E402

RECIPES = {
    "union": "tokenizer_source: union",
    "base": "tokenizer_source: base",
    "model": "tokenizer_source: a",
    "padded": "tokenizer: {source: union, pad_to_multiple_of: 64}",
    "tokens": """
tokenizer:
  source: union
  tokens:
    <|user|>: {source: a}
    <|b|>: {source: {kind: zero}, force: true}
    <|endoftext|>: {source: b, force: true}
    <|new|>: {source: {kind: model_token, model: a, token: <|tool|>}}
    <|tool|>: {source: {kind: model_token, model: b, token_id: 5}}
""",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    for seed, (name, topic, added) in enumerate(
        [("first", "animals", ("<|user|>",)), ("a", "kitchen", ("<|user|>", "<|tool|>")), ("b", "kitchen", ("<|tool|>", "<|b|>"))]
    ):
        save_llama(folder / name, save_tokenizer(folder / name, "byte level", topic, added), seed)
    return folder


# Without a base model, mergekit takes the "base" tokenizer from a model that differs from process to process.
@pytest.mark.parametrize("case, base", [(case, base) for case in RECIPES for base in (True, False) if base or case != "base"])
def test_same_rows(models, tmp_path, monkeypatch, case, base):
    monkeypatch.chdir(models)
    listed = "".join(
        f"- {{model: {name}, parameters: {{weight: {weight}}}}}\n" for name, weight in (("first", 0.3), ("a", 0.5), ("b", 1.0))
    )
    text = f"merge_method: linear\ndtype: float32\nmodels:\n{listed}{'base_model: first' if base else ''}\n{RECIPES[case]}\n"
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    theirs = merged_by_mergekit(text, tmp_path / "theirs")
    merge(path, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    ids = {name: transformers.AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() for name in ("ours", "theirs")}
    assert ids["ours"].keys() == ids["theirs"].keys() and ours.keys() == theirs.keys()
    tokens = list(ids["ours"])
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.shape == other.shape
        if tensor.shape[0] >= len(tokens):
            order = torch.tensor([ids["theirs"][token] for token in tokens]), torch.tensor([ids["ours"][token] for token in tokens])
            torch.testing.assert_close(tensor[order[1]], other[order[0]], rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(tensor[len(tokens) :], other[len(tokens) :], rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(tensor, other, rtol=2e-6, atol=1e-7)
