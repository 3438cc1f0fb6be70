"""Small real tokenizers, trained by the tokenizers library, and models of their size."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = {
    "animals": ["the quick brown fox jumps over the lazy dog", "a wise owl watches the foxes and the dogs jumping at night"] * 8,
    "kitchen": ["peel the onions and fry them slowly in butter", "the soup simmers while the bread is baking in the oven"] * 8,
    "harbour": ["ships unload their cargo at the old stone harbour", "the lighthouse guides the ships over the stormy sea"] * 8,
}


def byte_level(topic: str, size: int = 320) -> Tokenizer:
    """As GPT-2's: BPE over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[topic], trainer)
    return tokenizer


def byte_fallback(topic: str, size: int = 330) -> Tokenizer:
    """As Llama 2's: BPE over characters, bytes for unknown ones, spaces as U+2581."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(TEXTS[topic], trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    return tokenizer


def wordpiece(topic: str, size: int = 90) -> Tokenizer:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS[topic], trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    return tokenizer


def unigram(topic: str, size: int = 70) -> Tokenizer:
    """As T5's, without SentencePiece."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<pad>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS[topic], trainer)
    return tokenizer


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback, "wordpiece": wordpiece, "unigram": unigram}

_NAMED = {
    "byte level": {"eos_token": "<|endoftext|>"},
    "byte fallback": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "wordpiece": {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"},
    "unigram": {"unk_token": "<unk>", "pad_token": "<pad>"},
}


@functools.cache
def _trained(kind: str, topic: str) -> str:
    """Training the same twice gives ids in different orders."""
    return KINDS[kind](topic).to_str()


def save_tokenizer(folder: Path, kind: str, topic: str, added: tuple[str, ...] = (), cls: str = "PreTrainedTokenizerFast") -> int:
    """A tokenizer of a kind, with added control tokens, as transformers saves it; how many tokens it has."""
    tokenizer = getattr(transformers, cls)(tokenizer_object=Tokenizer.from_str(_trained(kind, topic)), **_NAMED[kind])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in added], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_llama(folder: Path, rows: int, seed: int, dtype: torch.dtype = torch.float32, tied: bool = False) -> dict[str, torch.Tensor]:
    """A tiny Llama with that many rows; its tensors."""
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
