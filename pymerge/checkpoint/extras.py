"""What stands beside the weights in a model folder: config.json, the tokenizer, the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .dtypes import NAMES, name_of
from .format import CheckpointError, load_json, open_regular
from .links import check_link
from .sizes import format_bytes

if TYPE_CHECKING:
    from ..recipe import Recipe

__all__ = [
    "COPIED", "SAME_WEIGHTS", "CardInput", "card", "config_with_dtype", "files_to_copy", "is_hub_name", "model_card", "read_config",
    "read_json", "to_json",
]  # fmt: skip

MAX_BYTES = 200_000_000

COPIED = (
    "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def files_to_copy(folder: Path | None) -> list[Path]:
    """Config, tokenizer and processor files of a model folder."""
    if folder is None:
        return []
    found = [folder / name for name in COPIED if (folder / name).is_file()]
    return found + sorted(path for path in folder.glob("*.tiktoken") if path.is_file())


def read_small(path: Path) -> bytes:
    """A small file's bytes.

    Raises:
        CheckpointError: it cannot be read or is not small.
    """
    check_link(path)
    fd, info = open_regular(path)
    with open(fd, "rb") as file:
        if info.st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: is {info.st_size} bytes long; such a file has at most {MAX_BYTES}")
        return file.read()


def read_config(folder: Path | None) -> dict[str, Any] | None:
    """The config.json of a model folder, None when there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    return None if folder is None else read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any] | None:
    """A small JSON file, None when there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    if not path.is_file():
        return None
    content = load_json(read_small(path), str(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return content


def config_with_dtype(raw: bytes, code: str) -> bytes:
    """config.json that says its weights are of dtype `code`; the same bytes when it says so already or does not say."""
    config = json.loads(raw)
    if not _set_dtype(config, name_of(code)):
        return raw
    return to_json(config)


def to_json(content: Any) -> bytes:
    """A JSON file as model folders have them."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    changed = False
    for key, value in config.items():
        if isinstance(value, dict):  # text_config, vision_config of a multimodal model
            changed |= _set_dtype(value, name)
        # transformers 4 calls it torch_dtype, 5 calls it dtype.
        elif key in ("dtype", "torch_dtype") and value in NAMES.values() and value != name:
            config[key] = name
            changed = True
    return changed


def is_hub_name(name: str) -> bool:
    """Whether a model card may call this a model on the hub."""
    return bool(_HUB_ID.fullmatch(name))


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CardInput:
    """One of the models that were merged, for the model card.

    Attributes:
        name: as the recipe writes it.
        base: whether deltas were taken from it.
        nbytes: of its tensors.
        dtypes: their safetensors codes.
        hashes: (file, SHA-256) of its files, as far as they are known.
    """

    name: str
    base: bool
    nbytes: int
    dtypes: tuple[str, ...]
    hashes: tuple[tuple[str, str], ...] = ()


def model_card(recipe: Recipe, title: str, inputs: Sequence[CardInput], transformers: bool) -> str:
    """README.md of the output: front matter as Hugging Face reads it, what was merged, the recipe, and how to do it again.

    The same arguments give the same text: no dates, no paths but those of the recipe.
    """
    # A path on somebody's disk is no model's name on the hub.
    on_hub = [name for name in dict.fromkeys(i.name for i in inputs) if is_hub_name(name)]
    front = ["library_name: transformers"] if transformers else []
    if on_hub:
        front += ["base_model:", *(f"- {name}" for name in on_hub), "base_model_relation: merge"]
    front += ["tags:", "- merge", "- pymerge"]
    intro = f"Merged by the method `{recipe.merge_method}` with pymerge {__version__} from:"
    return card(front, title, intro, inputs, recipe.to_yaml(), SAME_WEIGHTS, "pymerge merge recipe.yml OUT")


SAME_WEIGHTS = "With the recipe in a file `recipe.yml` and the same models, this makes the same weights, bit for bit:"


def card(front: Sequence[str], title: str, intro: str, inputs: Sequence[CardInput], recipe: str | None, again: str, command: str) -> str:
    """A README.md.

    Args:
        front: lines of the front matter.
        title: its heading.
        intro: what the table of `inputs` is about.
        recipe: YAML text, if there is one.
        again: what `command` does.
    """
    lines = ["---", *front, "---", "", f"# {_one_line(title)}", "", intro, "", *_input_table(inputs), ""]
    if recipe is not None:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe)), default=0))
        lines += ["## Recipe", "", f"{fence}yaml", recipe.rstrip("\n"), fence, ""]
    lines += ["## Do it again", "", again, "", "```sh", f"pip install pymerge-kernels=={__version__}", command, "```", ""]
    return "\n".join(lines)


def _input_table(inputs: Sequence[CardInput]) -> list[str]:
    lines = ["| model | | size | dtype |", "| --- | --- | --: | --- |"]
    lines += [f"| {_code(i.name)} | {'base' if i.base else ''} | {format_bytes(i.nbytes)} | {', '.join(i.dtypes)} |" for i in inputs]
    known = [(i.name, *pair) for i in inputs for pair in i.hashes]
    if known:
        lines += ["", "| model | file | SHA-256 |", "| --- | --- | --- |"]
        lines += [f"| {_code(name)} | {_code(file)} | `{digest}` |" for name, file, digest in known]
    return lines


def _code(text: str) -> str:
    """A code span for a cell of a table, whatever the text has in it."""
    text = _one_line(text).replace("|", "\\|")
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
