"""Merged folders are models to transformers: they load as they are and compute with the merged weights."""

import pytest
import torch

import pymerge
from pymerge.checkpoint.merge import merge

transformers = pytest.importorskip("transformers")

MODELS = {
    "llama": (
        transformers.AutoModelForCausalLM,
        transformers.LlamaConfig(
            vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=False,
        ),
    ),
    "llama, tied": (
        transformers.AutoModelForCausalLM,
        transformers.LlamaConfig(
            vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True,
        ),
    ),
    "gpt2": (transformers.AutoModelForCausalLM, transformers.GPT2Config(vocab_size=90, n_positions=40, n_embd=32, n_layer=2, n_head=4)),
    "bert": (
        transformers.AutoModel,
        transformers.BertConfig(
            vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40,
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    """A base and two fine-tunes: the class to load them with, their folder, and them."""
    cls, config = MODELS[request.param]
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    models = {"base": cls.from_config(config).eval()}
    for name in ("a", "b"):
        models[name] = cls.from_config(config).eval()
        models[name].load_state_dict({key: t + 0.02 * torch.randn_like(t) for key, t in models["base"].state_dict().items()})
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="30kB")
    return cls, folder, models


def merged_in_memory(method, models):
    base, a, b = (dict(model.state_dict()) for model in models.values())
    if method == "linear":
        return pymerge.linear([a, b], weights=[0.4, 0.6])
    return pymerge.ties(base, [a, b], weights=[1.0, 0.5], density=0.4, convention="mergekit")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_loads_and_computes(family, tmp_path, method):
    cls, folder, models = family
    weights = {"linear": (0.4, 0.6), "ties": (1.0, 0.5)}[method]
    density = {"density": 0.4} if method == "ties" else {}
    recipe = {
        "merge_method": method,
        "models": [{"model": str(folder / n), "parameters": {"weight": w, **density}} for n, w in zip("ab", weights)],
        **({"base_model": str(folder / "base")} if method == "ties" else {}),
    }
    merge(recipe, tmp_path / "out", shard_size="40kB")
    loaded, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    expected = cls.from_config(models["base"].config)
    expected.load_state_dict(merged_in_memory(method, models))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    ids = torch.arange(20).view(2, 10) * 4
    with torch.no_grad():
        got, want = (model.eval()(ids)[0] for model in (loaded, expected))
    assert torch.isfinite(got).all() and torch.equal(got, want)
