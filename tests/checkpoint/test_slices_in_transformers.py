"""Models put together from layers load in transformers, for architectures that nothing here knows."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.merge import merge

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
MODELS = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=80, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
    # config.json of these has a list with an item per layer, and their heads are tied
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**SMALL, num_key_value_heads=2, num_hidden_layers=4, tie_word_embeddings=True),
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL, num_hidden_layers=4)),
}
STACKS = {"gpt2": "transformer.h", "qwen2": "model.layers", "bert": "bert.encoder.layer"}


def save(folder, kind, config):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder / name)


def load(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("name", MODELS)
def test_frankenmerge(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, config = MODELS[name]
    save(tmp_path, kind, config)
    slices = [{"sources": [{"model": "a", "layer_range": [0, 3]}]}, {"sources": [{"model": "b", "layer_range": [1, 4]}]}]
    merge({"merge_method": "passthrough", "slices": slices}, "out")
    model = load(kind, tmp_path / "out")
    assert model.config.num_hidden_layers == 6
    parameters, b = dict(model.named_parameters()), load_file(tmp_path / "b/model.safetensors")
    compared = [n for n in parameters if n.startswith(f"{STACKS[name]}.5.")]
    assert compared and all(torch.equal(parameters[n], b[n.replace(".5.", ".3.", 1)]) for n in compared)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_encoder_kept_and_decoder_deepened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = transformers.T5ForConditionalGeneration
    save(tmp_path, kind, transformers.T5Config(vocab_size=80, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4))
    both = {"models": [{"model": "a"}, {"model": "b"}]}
    decoder = [{"sources": [{"model": "a", "layer_range": [0, 2]}]}, {"sources": [{"model": "b", "layer_range": [1, 2]}]}]
    modules = {"encoder": both, "decoder": {"slices": decoder}, "default": both}
    merge({"merge_method": "linear", "modules": modules, "parameters": {"weight": 0.5}}, "out")
    model = load(kind, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 3)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    torch.testing.assert_close(model.shared.weight.data, (a["shared.weight"] + b["shared.weight"]) / 2)
