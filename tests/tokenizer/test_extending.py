"""Unions load in transformers, keep the ids of the first tokenizer, and cut its texts as before."""

import json

import pytest

from pymerge.checkpoint.format import CheckpointError
from pymerge.tokenizer.extending import PLAIN, extend, union
from pymerge.tokenizer.reading import read_tokenizer

transformers = pytest.importorskip("transformers")

from .files import TEXTS, save_tokenizer  # noqa: E402

CLASSES = [
    ("byte level", None), ("byte level", "GPT2Tokenizer"), ("byte level", "Qwen2Tokenizer"),
    ("byte fallback", None), ("byte fallback", "LlamaTokenizer"), ("wordpiece", "BertTokenizer"), ("unigram", None),
]  # fmt: skip


def saved(folder, kind, topic, added, cls=None):
    save_tokenizer(folder, kind, topic, added)
    if cls is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": cls}))
    return read_tokenizer(folder)


def written(folder, tokenizer):
    folder.mkdir()
    for name, content in tokenizer.contents.items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind, cls", CLASSES)
def test_union(tmp_path, kind, cls):
    first = saved(tmp_path / "a", kind, "animals", ("<|start|>", "<|first|>"), cls)
    second = saved(tmp_path / "b", kind, "kitchen", ("<|start|>", "<|tool|>"), cls)
    third = saved(tmp_path / "c", kind, "harbour", ("<|tool|>", "<|third|>"), cls)
    made = extend(first, union(first, [(first, first.size), (second, second.size), (third, third.size)]))
    loaded, before = written(tmp_path / "out", made), transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.get_vocab() == made.ids and len(loaded) == made.size == len(made.ids)
    assert made.ids.items() >= first.ids.items() and made.ids.keys() == first.ids.keys() | second.ids.keys() | third.ids.keys()
    others = [t for t in made.ids if t not in first.ids]
    assert [made.ids[t] for t in others] == list(range(first.size, made.size))
    assert others.index("<|tool|>") < others.index("<|third|>")
    # Control tokens of all three are found in text, whatever stands around them.
    text = TEXTS["animals"][0] + "<|tool|>" + TEXTS["animals"][1] + "<|third|><|first|>"
    ids = loaded(text)["input_ids"]
    assert [i for i in ids if i in {made.ids[t] for t in ("<|tool|>", "<|third|>", "<|first|>")}] == [
        made.ids[t] for t in ("<|tool|>", "<|third|>", "<|first|>")
    ]
    assert loaded.decode(loaded(TEXTS["animals"][0])["input_ids"]) == before.decode(before(TEXTS["animals"][0])["input_ids"])
    assert loaded.special_tokens_map == before.special_tokens_map
    if first.looks_up:
        assert kind == "wordpiece"
        return
    for texts in TEXTS.values():
        for text in texts[:2]:
            if kind != "unigram" or before.unk_token_id not in before(text)["input_ids"]:
                assert loaded(text)["input_ids"] == before(text)["input_ids"]


def test_flags_of_added_tokens_are_kept(tmp_path):
    first = saved(tmp_path / "a", "byte level", "animals", ())
    second = saved(tmp_path / "b", "byte level", "animals", ("<|end|>",))
    second.added["<|end|>"] |= {"rstrip": True, "special": False}
    loaded = written(tmp_path / "out", extend(first, union(first, [(second, second.size)]) | {"<new>": PLAIN}))
    end, new = (loaded.added_tokens_decoder[loaded.convert_tokens_to_ids(token)] for token in ("<|end|>", "<new>"))
    assert end.rstrip and not end.special and not new.rstrip and not new.normalized and not new.special


def test_tokens_without_a_row_do_not_count(tmp_path):
    first = saved(tmp_path / "a", "byte level", "animals", ())
    second = saved(tmp_path / "b", "byte level", "animals", ("<x>", "<y>"))
    assert list(union(first, [(second, second.size - 1)])) == ["<x>"]
    assert extend(first, {}) is first


def test_ignore_merges_looks_words_up(tmp_path):
    assert not saved(tmp_path, "byte level", "animals", ()).looks_up
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert read_tokenizer(tmp_path).looks_up


def test_slow_gpt2_files(tmp_path):
    """Only vocab.json and merges.txt: both kinds of tokens find their places."""
    saved(tmp_path / "fast", "byte level", "animals", ())
    model = json.loads((tmp_path / "fast" / "tokenizer.json").read_text())["model"]
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps(model["vocab"]))
    (slow / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    first, second = read_tokenizer(slow), saved(tmp_path / "b", "byte level", "kitchen", ("<|tool|>",))
    made = extend(first, union(first, [(second, second.size)]))
    loaded, before = written(tmp_path / "out", made), transformers.AutoTokenizer.from_pretrained(slow)
    assert loaded.get_vocab() == made.ids
    for text in (*TEXTS["animals"][:2], *TEXTS["kitchen"][:2]):
        assert loaded(text)["input_ids"] == before(text)["input_ids"]
    assert made.ids["<|tool|>"] in loaded("a<|tool|>b")["input_ids"]


def test_vocab_txt(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfox\n##es\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    first = read_tokenizer(tmp_path)
    made = extend(first, {"owl": None, "[X]": PLAIN})
    assert made.contents["vocab.txt"].decode().split("\n")[-3:] == ["owl", "[X]", ""]
    loaded = written(tmp_path / "out", made)
    assert loaded.get_vocab() == made.ids and loaded.tokenize("owl foxes[X]") == ["owl", "fox", "##es", "[X]"]
    with pytest.raises(CheckpointError, match="line break"):
        extend(first, {"a\nb": None})


def test_sentencepiece_model_cannot_grow(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(TEXTS["animals"]))
    options = "--model_type=bpe --vocab_size=60 --minloglevel=2 --hard_vocab_limit=false"
    sentencepiece.SentencePieceTrainer.Train(f"--input={tmp_path / 'text'} --model_prefix={tmp_path / 'tokenizer'} {options}")
    first = read_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="1 ordinary tokens cannot be appended to a SentencePiece model"):
        extend(first, {"word": None})
    made = extend(first, {"<|tool|>": PLAIN})
    assert json.loads(made.contents["added_tokens.json"]) == {"<|tool|>": first.size}
    assert json.loads(made.contents["tokenizer_config.json"])["added_tokens_decoder"][str(first.size)]["content"] == "<|tool|>"
    assert made.contents["tokenizer.model"] == first.contents["tokenizer.model"]


def test_ids_with_gaps(tmp_path):
    """Gaps stay gaps where ids are written down; a list has none."""
    saved(tmp_path / "a", "byte fallback", "animals", ())
    data = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    last = max(data["model"]["vocab"].items(), key=lambda item: item[1])[0]
    data["model"]["vocab"][last] += 3
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(data))
    first = read_tokenizer(tmp_path / "a")
    made = extend(first, {"<x>": PLAIN, "plain": None})
    assert made.ids["<x>"] == first.size and written(tmp_path / "out", made).get_vocab() == made.ids
