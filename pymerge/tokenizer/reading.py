"""Reading the vocabulary of a model folder from its tokenizer files, as transformers would number it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.extras import read_small
from ..checkpoint.format import CheckpointError, load_json

__all__ = ["FLAGS", "MAX_ID", "TOKENIZER_FILES", "Tokenizer", "load_object", "read_tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""How an added token is matched in text, with the defaults of Hugging Face's tokenizers."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_Vocabulary = tuple[dict[str, int], dict[str, dict[str, bool]], bool]
"""Tokenizer.ids, .added and .looks_up."""

MAX_ID = 1 << 24
"""A damaged file must not ask for memory: the largest vocabularies have about a million tokens."""


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary of a tokenizer.

    Attributes:
        folder: of the files.
        kind: the file that holds the vocabulary: "tokenizer.json", "vocab.json", "vocab.txt" or "tokenizer.model".
        ids: token -> id, added tokens included.
        added: added token -> its flags (FLAGS).
        contents: the files, by name.
        looks_up: whether words are looked up in the vocabulary (WordPiece, word level, BPE that ignores its merges), and not built by
            merges or scores: then a token is found in text for the mere reason that it is there.
    """

    folder: Path
    kind: str
    ids: dict[str, int]
    added: dict[str, dict[str, bool]]
    contents: dict[str, bytes]
    looks_up: bool

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


def read_tokenizer(folder: Path, known: dict[tuple, Tokenizer] | None = None) -> Tokenizer | None:
    """The tokenizer of a model folder, None when there is none.

    Args:
        folder: the model's.
        known: tokenizers read before, by their files' bytes; models of one family have the same, which is then parsed once.

    Raises:
        CheckpointError: a file is malformed, two tokens claim one id, or the vocabulary is in a form that cannot be read.
    """
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    contents = {name: read_small(folder / name) for name in names}
    key = tuple(contents.items())
    if known is not None and key in known:
        return known[key]
    kind = next((kind for kind in _READERS if kind in contents), None)
    if kind is None:
        unreadable = [name for name in ("spiece.model", "sentencepiece.bpe.model", "tekken.json") if name in contents]
        if unreadable:
            raise CheckpointError(
                f"{folder / unreadable[0]}: vocabularies of this form are not read; save the tokenizer as tokenizer.json: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        return None
    ids, added, looks_up = _READERS[kind](contents, folder)
    _add_declared(ids, added, contents, folder)
    for token, flags in _named_tokens(contents, folder):
        if token not in ids:  # transformers appends them when it loads the tokenizer
            ids[token] = max(ids.values(), default=-1) + 1
        added.setdefault(token, flags)
    tokenizer = Tokenizer(folder, kind, ids, added, contents, looks_up)
    if known is not None:
        known[key] = tokenizer
    return tokenizer


def load_object(contents: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    """One of the files of a folder as a JSON object, empty when there is none.

    Raises:
        CheckpointError: it is none.
    """
    if name not in contents:
        return {}
    value = load_json(contents[name], str(folder / name))
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: is not a JSON object")
    if b"\\u" in contents[name]:
        try:  # JSON can spell half of a surrogate pair, which no file can hold again
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{folder / name}: has a text that is not Unicode") from None
    return value


def _checked(ids: Any, what: str) -> dict[str, int]:
    """A mapping of tokens to ids, every id a small number."""
    if not isinstance(ids, dict):
        raise CheckpointError(f"{what} is not an object of tokens and their ids")
    for token, number in ids.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_ID:
            raise CheckpointError(f"{what}: token {token!r} has id {str(number)[:80]}; ids are whole numbers from 0 to {MAX_ID - 1}")
    return dict(ids)


def _flags(entry: dict[str, Any]) -> dict[str, bool]:
    return {key: bool(entry.get(key, default)) for key, default in FLAGS.items()}


def _from_tokenizer_json(contents: dict[str, bytes], folder: Path) -> _Vocabulary:
    what = str(folder / "tokenizer.json")
    data = load_object(contents, "tokenizer.json", folder)
    model = data.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise CheckpointError(f"{what}: has no model.vocab")
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score] at the place of its id
        if not all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in vocab):
            raise CheckpointError(f"{what}: model.vocab is not a list of [token, score]")
        vocab = {item[0]: i for i, item in enumerate(vocab)}
    ids = _checked(vocab, f"{what}: model.vocab")
    entries = data.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and isinstance(entry.get("content"), str) for entry in entries):
        raise CheckpointError(f"{what}: added_tokens is not a list of tokens")
    declared = _checked({entry["content"]: entry.get("id") for entry in entries}, f"{what}: added_tokens")
    added, last = {entry["content"]: _flags(entry) for entry in entries}, -1
    size = len(ids)
    for token, number in declared.items():
        # The rule of the tokenizers library, which heeds the declared id only to warn.
        actual = ids.setdefault(token, last + 1 if last >= size else size)
        if number != actual:
            raise CheckpointError(f"{what}: says that {token!r} has id {number}, but as it is written tokenizers give it id {actual}")
        last = max(last, actual)
    looks_up = isinstance(model["vocab"], dict) and ("merges" not in model or bool(model.get("ignore_merges")))
    return ids, added, looks_up


def _from_vocab_json(contents: dict[str, bytes], folder: Path) -> _Vocabulary:
    return _checked(load_object(contents, "vocab.json", folder), str(folder / "vocab.json")), {}, False


def _from_vocab_txt(contents: dict[str, bytes], folder: Path) -> _Vocabulary:
    try:
        text = contents["vocab.txt"].decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder / 'vocab.txt'}: is not UTF-8 text (byte {error.start})") from None
    # One token per line; str.splitlines would also break at U+2028 and its like, which are tokens.
    return {token.removesuffix("\r"): i for i, token in enumerate(text.removesuffix("\n").split("\n"))}, {}, True


def _from_sentencepiece(contents: dict[str, bytes], folder: Path) -> _Vocabulary:
    path = folder / "tokenizer.model"
    try:
        import sentencepiece
    except ImportError:
        raise CheckpointError(
            f"{path}: a SentencePiece vocabulary is read by the package sentencepiece (pip install sentencepiece); or save the tokenizer "
            f"as tokenizer.json: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        ) from None
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(contents["tokenizer.model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: is not a SentencePiece model: {error}") from None
    return {processor.IdToPiece(i): i for i in range(processor.GetPieceSize())}, {}, False


_READERS: dict[str, Callable[[dict[str, bytes], Path], _Vocabulary]] = {
    "tokenizer.json": _from_tokenizer_json,
    "vocab.json": _from_vocab_json,
    "vocab.txt": _from_vocab_txt,
    "tokenizer.model": _from_sentencepiece,
}


def _add_declared(ids: dict[str, int], added: dict[str, dict[str, bool]], contents: dict[str, bytes], folder: Path) -> None:
    """Tokens that tokenizer_config.json or, failing that, added_tokens.json adds to the vocabulary."""
    decoder = load_object(contents, "tokenizer_config.json", folder).get("added_tokens_decoder")
    if isinstance(decoder, dict):
        source = "tokenizer_config.json"
        declared = {}
        for number, entry in decoder.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not number.isdecimal() or len(number) > 9:
                raise CheckpointError(f"{folder / source}: added_tokens_decoder has an entry {number!r:.80} that is not the id of a token")
            declared[entry["content"]] = (int(number), _flags(entry))
    else:
        source = "added_tokens.json"
        numbers = _checked(load_object(contents, source, folder), str(folder / source))
        declared = {token: (number, {**FLAGS, "normalized": False}) for token, number in numbers.items()}
    numbers = _checked({token: number for token, (number, _) in declared.items()}, str(folder / source))
    taken = {number: token for token, number in ids.items()}
    for token, (_, flags) in sorted(declared.items(), key=lambda item: item[1][0]):
        if token not in ids:
            number = numbers[token]
            if number in taken:
                raise CheckpointError(f"{folder / source}: adds {token!r} with id {number}, which is {taken[number]!r}")
            ids[token], taken[number] = number, token
        added.setdefault(token, flags)


def _named_tokens(contents: dict[str, bytes], folder: Path) -> Iterator[tuple[str, dict[str, bool]]]:
    """Special tokens by role, in the order in which transformers adds them."""
    config = {**load_object(contents, "special_tokens_map.json", folder), **load_object(contents, "tokenizer_config.json", folder)}
    more = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    listed = [item for value in more if isinstance(value, dict | list) for item in (value.values() if isinstance(value, dict) else value)]
    for value in [*(config.get(role) for role in NAMED), *listed]:
        entry = {"content": value} if isinstance(value, str) else value
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield entry["content"], {**_flags({"normalized": False, **entry}), "special": True}
