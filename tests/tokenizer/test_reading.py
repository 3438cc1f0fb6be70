"""Vocabularies as transformers numbers them, from every form of file."""

import json

import pytest

from pymerge.checkpoint.format import CheckpointError
from pymerge.tokenizer.reading import read_tokenizer

transformers = pytest.importorskip("transformers")

from .files import KINDS, TEXTS, byte_fallback, save_tokenizer  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json(tmp_path, kind):
    save_tokenizer(tmp_path, kind, "animals", ("<|im_start|>", "<|im_end|>"))
    tokenizer = read_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.kind == "tokenizer.json" and tokenizer.ids == theirs.get_vocab() and tokenizer.size == len(theirs)
    assert tokenizer.added["<|im_end|>"]["special"] and not tokenizer.added["<|im_end|>"]["normalized"]
    assert {tokenizer.ids[token] for token, flags in tokenizer.added.items() if flags["special"]} >= set(theirs.all_special_ids)


def test_special_tokens_that_only_the_config_names(tmp_path):
    """transformers appends them while loading; so must we, or all ids behind them would be off."""
    save_tokenizer(tmp_path, "byte level", "animals")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"pad_token": "<pad>", "additional_special_tokens": ["<one>", {"content": "<two>", "lstrip": True, "__type": "AddedToken"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.ids == transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert tokenizer.added["<two>"]["lstrip"] and tokenizer.added["<pad>"]["special"]


def test_slow_files(tmp_path):
    """vocab.json with merges.txt, as GPT-2 came, and added_tokens.json."""
    save_tokenizer(tmp_path / "fast", "byte level", "animals")
    model = json.loads((tmp_path / "fast" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<sep>": len(model["vocab"])}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.kind == "vocab.json"
    assert tokenizer.ids == transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()


def test_vocab_txt(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "##es", "a\u2028b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8", newline="")
    assert read_tokenizer(tmp_path).ids == {word: i for i, word in enumerate(words)}


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(TEXTS["animals"]))
    options = "--model_type=bpe --vocab_size=60 --minloglevel=2 --hard_vocab_limit=false"
    sentencepiece.SentencePieceTrainer.Train(f"--input={tmp_path / 'text'} --model_prefix={tmp_path / 'tokenizer'} {options}")
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 60}')
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.ids == {**{processor.id_to_piece(i): i for i in range(processor.get_piece_size())}, "<pad>": 60}
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(CheckpointError, match="tokenizer.model: is not a SentencePiece model"):
        read_tokenizer(tmp_path)


def test_sentencepiece_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(CheckpointError, match="pip install sentencepiece.*save_pretrained"):
        read_tokenizer(tmp_path)


def test_none(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tekken.json: vocabularies of this form are not read"):
        read_tokenizer(tmp_path)


def test_the_same_files_are_parsed_once(tmp_path):
    for name in ("a", "b", "c"):
        save_tokenizer(tmp_path / name, "wordpiece", "kitchen", ("<x>",) if name == "c" else ())
    known = {}
    a, b, c = (read_tokenizer(tmp_path / name, known) for name in "abc")
    assert a is b and c is not a


BAD = {
    "no model": ({"added_tokens": []}, "has no model.vocab"),
    "vocab a number": ({"model": {"vocab": 3}}, "model.vocab is not an object"),
    "pieces": ({"model": {"vocab": [["a", 0.0], ["b"]]}}, "not a list of"),
    "text id": ({"model": {"vocab": {"a": "0"}}}, "token 'a' has id 0; ids are whole numbers"),
    "huge id": ({"model": {"vocab": {"a": 10**12}}}, "token 'a' has id 1000000000000"),
    "added": ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}, "added_tokens is not a list of tokens"),
    "gap": ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 5, "content": "b"}]}, "'b' has id 5, but .* give it id 1"),
    "other id": ({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "b"}]}, "'b' has id 2, but .* id 1"),
    "half a character": ({"model": {"vocab": {"\ud800": 0}}}, "has a text that is not Unicode"),
    "a list": ([], "tokenizer.json: is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed(tmp_path, case):
    data, message = BAD[case]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"tokenizer.json.*{message}" if "tokenizer.json" not in message else message):
        read_tokenizer(tmp_path)


def test_malformed_companions(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_fallback("harbour").to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"content": "<new>"}}}')
    with pytest.raises(CheckpointError, match="tokenizer_config.json: adds '<new>' with id 3, which is '<0x00>'"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {"content": "<new>"}}}')
    with pytest.raises(CheckpointError, match="has an entry 'x' that is not the id of a token"):
        read_tokenizer(tmp_path)
