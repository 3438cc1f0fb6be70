"""Which tensors have one row per token: for the families that people merge, and never by a guess."""

from pathlib import Path

import pytest

from pymerge.checkpoint.format import CheckpointError, TensorInfo
from pymerge.checkpoint.vocabulary_tensors import find_vocabulary_tensors, vocab_size_of

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 90}
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": False}, {"model.embed_tokens.weight", "lm_head.weight"}),
    "gpt2": ("GPT2Model", "GPT2Config", {"vocab_size": 90, "n_positions": 90, "n_embd": 16, "n_layer": 1, "n_head": 2}, {"wte.weight"}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, {"gpt_neox.embed_in.weight", "lm_head.weight"}),
    "bloom": ("BloomModel", "BloomConfig", {"vocab_size": 90, "hidden_size": 16, "n_layer": 1, "n_head": 2}, {"word_embeddings.weight"}),
    "bert": (
        "BertForMaskedLM", "BertConfig", {**SMALL, "max_position_embeddings": 90},
        {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight",
         "cls.predictions.decoder.bias"},
    ),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": 90, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
        {"distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight", "vocab_projector.bias"},
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 90, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False},
        {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
    ),
    "mamba": ("MambaModel", "MambaConfig", {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 1}, {"embeddings.weight"}),
}  # fmt: skip

CODES = {torch.float32: "F32", torch.int64: "I64"}


def infos(tensors) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, CODES[t.dtype], tuple(t.shape), Path("m"), 0, t.numel() * 4) for name, t in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model, config, values, expected = FAMILIES[family]
    with torch.device("meta"):
        tensors = infos(getattr(transformers, model)(getattr(transformers, config)(**values)).state_dict())
    assert set(find_vocabulary_tensors(tensors, 90)) == expected
    assert find_vocabulary_tensors(tensors, None) == find_vocabulary_tensors(tensors, 90)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plain(**shapes) -> dict[str, TensorInfo]:
    return infos({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def test_disagreement_and_doubt():
    with pytest.raises(CheckpointError, match="config.json says vocab_size is 90, but lm_head.weight has 91 rows"):
        find_vocabulary_tensors(plain(**{EMBED: (90, 4), HEAD: (91, 4)}), 90)
    with pytest.raises(CheckpointError, match="'model.embed_tokens.weight' has 90, but lm_head.weight has 91 rows"):
        find_vocabulary_tensors(plain(**{EMBED: (90, 4), HEAD: (91, 4)}), None)
    doubtful = plain(**{EMBED: (90, 4), "model.special.weight": (90, 8), "model.norm.weight": (90,), "h.0.x.weight": (90, 4)})
    with pytest.raises(
        CheckpointError, match="'model.special.weight' has 90 rows, like the vocabulary, but may be something else; list the"
    ):
        find_vocabulary_tensors(doubtful, 90)
    assert find_vocabulary_tensors(doubtful, 90, [EMBED]) == [EMBED]
    assert find_vocabulary_tensors(doubtful, 90, [EMBED, "model.special.weight"]) == [EMBED, "model.special.weight"]
    with pytest.raises(CheckpointError, match="vocab_size is 90, but no tensor is known to be an embedding; list the tensors"):
        find_vocabulary_tensors(plain(**{"a.weight": (90, 4)}), 90)
    assert find_vocabulary_tensors(plain(**{"vision.patch.weight": (16, 4)}), None) == []


def test_size_in_config():
    assert vocab_size_of({"vocab_size": 5}) == vocab_size_of({"text_config": {"vocab_size": 5}}) == 5
    assert vocab_size_of(None) is vocab_size_of({}) is vocab_size_of({"vocab_size": "5"}) is vocab_size_of({"vocab_size": True}) is None
