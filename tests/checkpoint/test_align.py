"""Merges of models with different vocabularies, from recipe to the loaded result."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.plan import make_plan
from pymerge.recipe import RecipeError

transformers = pytest.importorskip("transformers")

from ..tokenizer.files import save_llama, save_tokenizer  # noqa: E402
from .files import tree  # noqa: E402

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base, a and b with different vocabularies (a has 60 rows more than tokens); folder and tensors."""
    folder = tmp_path_factory.mktemp("vocabularies")
    tensors = {}
    for seed, (name, topic, added, more) in enumerate(
        [("zero", "animals", ("<|user|>",), 0), ("a", "kitchen", ("<|user|>", "<|tool|>"), 60), ("b", "kitchen", ("<|tool|>", "<|b|>"), 0)]
    ):
        count = save_tokenizer(folder / name, "byte level", topic, added)
        tensors[name] = save_llama(folder / name, count + more, seed)
    return folder, tensors


def vocabulary(folder) -> dict[str, int]:
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def run(models, tmp_path, threads=1, **recipe):
    folder, _ = models
    named = {"merge_method": "linear", "base_model": str(folder / "zero"), **recipe}
    named.setdefault("models", [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in ("zero", "a", "b")])
    report = merge(named, tmp_path / "out", threads=threads, force=True)
    return report, load_file(tmp_path / "out" / "model.safetensors"), vocabulary(tmp_path / "out")


def filled(models, name, tensor, out, base="zero", names=("zero", "a", "b")):
    """A model's tensor over the output's vocabulary, token by token: its own row, the only one there is, the base's, or the mean."""
    folder, tensors = models
    vocabularies = {n: vocabulary(folder / n) for n in names}
    rows = torch.zeros(len(out), *tensors[name][tensor].shape[1:])
    for token, number in out.items():
        have = {n: tensors[n][tensor][v[token]] for n, v in vocabularies.items() if token in v}
        if name in have:
            rows[number] = have[name]
        elif have:
            rows[number] = have[base] if base in have else torch.stack(list(have.values())).mean(0)
    return rows


@pytest.mark.parametrize("source", ["union", "base", "a"])
def test_rows_of_every_token(models, tmp_path, source):
    folder, tensors = models
    _, merged, out = run(models, tmp_path, tokenizer_source=str(folder / "a") if source == "a" else source)
    vocabularies = {name: vocabulary(folder / name) for name in tensors}
    if source == "union":
        assert out.keys() == set().union(*vocabularies.values()) and out.items() >= vocabularies["zero"].items()
    else:
        assert out == vocabularies["zero" if source == "base" else "a"]
    for tensor in (EMBED, HEAD):
        expected = sum(filled(models, name, tensor, out) for name in tensors) / 3
        torch.testing.assert_close(merged[tensor], expected, rtol=2e-6, atol=1e-7)
    # Tokens of one model alone have its rows, whatever the others' weights.
    for token in set(out) & (set(vocabularies["b"]) - set(vocabularies["a"]) - set(vocabularies["zero"])):
        torch.testing.assert_close(merged[EMBED][out[token]], tensors["b"][EMBED][vocabularies["b"][token]], rtol=2e-6, atol=1e-7)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(out) == model.get_input_embeddings().weight.shape[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all() and model(ids).logits.shape[-1] == len(out)


def test_without_a_base_the_mean_fills(models, tmp_path):
    folder, tensors = models
    _, merged, out = run(models, tmp_path, tokenizer_source="union", base_model=None)
    expected = sum(filled(models, name, EMBED, out, base=None) for name in tensors) / 3
    torch.testing.assert_close(merged[EMBED], expected, rtol=2e-6, atol=1e-7)
    ids = {name: vocabulary(folder / name) for name in tensors}
    token = min(ids["a"].keys() & ids["b"].keys() - ids["zero"].keys())
    mean = sum(tensors[name][EMBED][ids[name][token]] for name in "ab") / 2
    torch.testing.assert_close(merged[EMBED][out[token]], mean, rtol=2e-6, atol=1e-7)


def test_choices_for_single_tokens(models, tmp_path):
    """Every kind of source, with and without force, among them a token that no model has."""
    folder, tensors = models
    a, b = str(folder / "a"), str(folder / "b")
    in_b = vocabulary(folder / "b")
    tokens = {
        "<|user|>": {"source": a},  # all have it but b
        "<|tool|>": {"source": {"kind": "model_token", "model": b, "token": "<|endoftext|>"}},  # only the base lacks it
        "<|b|>": {"source": {"kind": "zero"}, "force": True},
        "<|endoftext|>": {"source": b, "force": True},
        "<|new|>": {"source": {"kind": "model_token", "model": a, "token_id": 7}},
        "<|none|>": {"source": {"kind": "zero"}},
    }
    _, merged, out = run(models, tmp_path, tokenizer={"source": "union", "tokens": tokens})
    for tensor in (EMBED, HEAD):
        rows = {n: t[tensor] for n, t in tensors.items()}
        ids = {n: vocabulary(folder / n) for n in tensors}
        expected = {
            "<|user|>": rows["zero"][ids["zero"]["<|user|>"]] + 2 * rows["a"][ids["a"]["<|user|>"]],
            "<|tool|>": rows["b"][in_b["<|endoftext|>"]] + rows["a"][ids["a"]["<|tool|>"]] + rows["b"][in_b["<|tool|>"]],
            "<|b|>": torch.zeros(16),
            "<|endoftext|>": 3 * rows["b"][in_b["<|endoftext|>"]],
            "<|new|>": 3 * rows["a"][7],
            "<|none|>": torch.zeros(16),
        }
        for token, total in expected.items():
            torch.testing.assert_close(merged[tensor][out[token]], total / 3, rtol=2e-6, atol=1e-7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("a<|new|>b")[1] == "<|new|>"


def test_padding_to_a_multiple(models, tmp_path):
    report, merged, out = run(models, tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 64})
    rows = -(-len(out) // 64) * 64
    assert rows > len(out) and merged[EMBED].shape[0] == merged[HEAD].shape[0] == rows
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == rows
    expected = sum(filled(models, name, EMBED, out).mean(0) for name in ("zero", "a", "b")) / 3
    torch.testing.assert_close(merged[EMBED][len(out) :], expected.expand(rows - len(out), -1), rtol=1e-5, atol=1e-6)
    assert not any("rounds that up" in warning for warning in report.warnings)
    first = tree(tmp_path / "out")
    run(models, tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 64}, threads=3)
    assert tree(tmp_path / "out") == first


def test_rows_beyond_the_tokenizer_are_cut(models, tmp_path):
    folder, tensors = models
    report, merged, out = run(models, tmp_path, tokenizer_source="base", base_model=str(folder / "a"))
    count = len(vocabulary(folder / "a"))
    assert merged[EMBED].shape[0] == count == tensors["a"][EMBED].shape[0] - 60
    assert any(f"{count + 60} rows for {count} tokens; the output has {count} rows (pad_to_multiple_of" in w for w in report.warnings)


def test_bf16_and_fp16(models, tmp_path):
    """Rows of models in different dtypes are mixed in the dtype that holds both."""
    folder, tensors = models
    for name, dtype in (("zero", torch.bfloat16), ("b", torch.float16)):
        save_tokenizer(tmp_path / name, "byte level", "animals" if name == "zero" else "kitchen", (f"<|{name}|>",))
        rows = len(vocabulary(tmp_path / name))
        save_llama(tmp_path / name, rows, 5, dtype)
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in ("zero", "b")]
    merge({"merge_method": "linear", "models": models, "tokenizer_source": "union"}, tmp_path / "out")
    merged, out = load_file(tmp_path / "out" / "model.safetensors"), vocabulary(tmp_path / "out")
    for name in ("zero", "b"):
        own = load_file(tmp_path / name / "model.safetensors")[EMBED].float()
        number = vocabulary(tmp_path / name)[f"<|{name}|>"]
        assert merged[EMBED].dtype == torch.float32 and torch.equal(merged[EMBED][out[f"<|{name}|>"]], own[number])


def test_a_tied_head_beside_an_untied_one(tmp_path):
    """The tied model's head takes the rows that it lacks from the others' heads, not from their embeddings."""
    save_tokenizer(tmp_path / "tied", "byte level", "animals")
    save_tokenizer(tmp_path / "untied", "byte level", "animals", ("<|new|>",))
    rows = len(vocabulary(tmp_path / "tied"))
    save_llama(tmp_path / "tied", rows, 0, tied=True)
    tensors = save_llama(tmp_path / "untied", rows + 1, 1)
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in ("tied", "untied")]
    merge({"merge_method": "linear", "models": models, "tokenizer_source": "union"}, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for tensor in (EMBED, HEAD):
        torch.testing.assert_close(merged[tensor][rows], tensors[tensor][rows])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["vocab_size"] == rows + 1


def test_special_tokens_follow_the_tokenizer(models, tmp_path):
    """A tokenizer of another model than the config brings its own ids for beginning and end; others are found by their text."""
    folder, _ = models
    save_tokenizer(tmp_path / "other", "byte fallback", "harbour", ("<image>",))
    save_llama(tmp_path / "other", len(vocabulary(tmp_path / "other")), 9)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "bos_token_id": 1, "eos_token_id": [2]}))
    save_tokenizer(tmp_path / "first", "byte level", "animals", ("<image>", "<video>"))
    ids = vocabulary(tmp_path / "first")
    save_llama(tmp_path / "first", len(ids), 3)
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    more = {"image_token_id": ids["<image>"], "text_config": {"video_token_id": ids["<video>"]}}
    (tmp_path / "first" / "config.json").write_text(json.dumps({**config, **more}))
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in ("first", "other")]
    report = merge({"merge_method": "linear", "models": models, "tokenizer_source": str(tmp_path / "other")}, tmp_path / "out")
    config, out = json.loads((tmp_path / "out" / "config.json").read_text()), vocabulary(tmp_path / "out")
    assert config["bos_token_id"] == 1 and config["eos_token_id"] == [2] and config["image_token_id"] == out["<image>"]
    assert config["text_config"]["video_token_id"] is None and any("video_token_id of" in w for w in report.warnings)
    assert out == vocabulary(tmp_path / "other") and config["vocab_size"] == len(out)


def test_the_same_vocabulary_changes_nothing(tmp_path):
    for name in ("a", "b"):
        save_tokenizer(tmp_path / name, "byte level", "animals")
        save_llama(tmp_path / name, len(vocabulary(tmp_path / name)), ord(name))
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in ("a", "b")]}
    merge(recipe, tmp_path / "plain")
    merge({**recipe, "tokenizer_source": "union"}, tmp_path / "union")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {path.name for path in (tmp_path / "union").iterdir()}
    for name in names - {"README.md", "pymerge.json", "model.safetensors"}:
        assert json.loads((tmp_path / "plain" / name).read_bytes()) == json.loads((tmp_path / "union" / name).read_bytes())
    plain, union = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "union"))
    assert all(torch.equal(tensor, union[name]) for name, tensor in plain.items())


def test_padding_without_tokenizers(models, tmp_path):
    folder, tensors = models
    _, merged, _ = run(models, tmp_path, vocabulary="pad")
    most = max(t[EMBED].shape[0] for t in tensors.values())
    assert merged[EMBED].shape[0] == most == json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    rows = [t[EMBED] for t in tensors.values()]
    for i in range(most):
        have = [t[i] if i < len(t) else None for t in rows]
        there = [r for r in have if r is not None]
        default = rows[0][i] if i < len(rows[0]) else sum(there) / len(there)
        torch.testing.assert_close(merged[EMBED][i], sum(default if r is None else r for r in have) / 3, rtol=2e-6, atol=1e-7)


ERRORS = {
    "no such token": ({"tokens": {"<|x|>": {"source": "B"}}}, r"tokenizer.tokens.<\|x\|>: .*b has no token '<\|x\|>'; take it from"),
    "row": ({"tokens": {"a": {"source": {"kind": "model_token", "model": "B", "token_id": 9999}}}}, "token_id is 9999, but .*b has"),
    "rows": ({"pad_to_multiple_of": 10**9}, "pad_to_multiple_of: makes 1000000000 rows of .*; more than"),
    "tensors": ({"tensors": [EMBED, "model.norm.weight"]}, "has 16 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(models, case):
    folder, _ = models
    said, message = ERRORS[case]
    spec = json.loads(json.dumps({"source": "union", **said}).replace('"B"', json.dumps(str(folder / "b"))))
    recipe = {"merge_method": "linear", "models": [{"model": str(folder / n), "parameters": {"weight": 1}} for n in ("zero", "b")]}
    with pytest.raises(RecipeError, match=message):
        make_plan({**recipe, "tokenizer": spec})


def test_a_model_without_a_tokenizer(models, tmp_path):
    """As many rows as the base: the base's tokenizer is taken for it, with a warning. Otherwise nobody knows."""
    folder, tensors = models
    save_llama(tmp_path / "same", tensors["zero"][EMBED].shape[0], 4)
    save_llama(tmp_path / "more", tensors["zero"][EMBED].shape[0] + 1, 4)
    recipe = {"merge_method": "linear", "tokenizer_source": "union"}
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in (folder / "zero", tmp_path / "same")]
    with make_plan({**recipe, "models": models}) as plan:
        assert any("has no tokenizer; that of" in warning for warning in plan.warnings)
    models[1]["model"] = str(tmp_path / "more")
    with pytest.raises(RecipeError, match="more has no tokenizer .tokenizer.json. to say what its"):
        make_plan({**recipe, "models": models})


def test_embeddings_of_different_width(tmp_path):
    from safetensors.torch import save_file

    for name, width in (("a", 4), ("b", 6)):
        count = save_tokenizer(tmp_path / name, "byte level", "animals", ("<x>",) if name == "b" else ())
        save_file({EMBED: torch.zeros(count, width)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": count}))
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 1}} for n in "ab"]
    with pytest.raises(RecipeError, match=r"rows of shape \[4\] in .*a and \[6\] in .*b; they cannot be mixed"):
        make_plan({"merge_method": "linear", "models": models, "tokenizer_source": "union"})
