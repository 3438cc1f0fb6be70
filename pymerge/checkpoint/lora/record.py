"""What an adapter says about how it was made: pymerge.json for `pymerge verify`, README.md for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...recipe.schema import yaml_text
from ..extras import SAME_WEIGHTS, CardInput, card, is_hub_name
from ..inputs import sha256_of
from ..layout import Layout
from ..provenance import FILE_NAME, provenance_file
from ..store import TensorStore
from .adapter import Adapter
from .save import Files

__all__ = ["Used", "extract_files", "merge_files", "used_adapter", "used_model"]


@dataclass(frozen=True)
class Used:
    """An adapter or a model that another adapter was made of.

    Attributes:
        name: as it was given.
        role: "adapter", "model" or "base".
        nbytes, dtypes: of its tensors.
        files: what it consists of.
        hashes: their SHA-256, as far as known.
    """

    name: str
    role: str
    nbytes: int
    dtypes: tuple[str, ...]
    files: tuple[Path, ...]
    hashes: Mapping[Path, str]

    def on_card(self) -> CardInput:
        """For the model card."""
        hashes = tuple((file.name, digest) for file, digest in self.hashes.items())
        return CardInput(self.name, self.role == "base", self.nbytes, self.dtypes, hashes)


def used_adapter(adapter: Adapter) -> Used:
    """An adapter, with the hashes of its files, which are small.

    Raises:
        CheckpointError: one cannot be read.
    """
    hashes = {file: sha256_of(file) for file in adapter.files}
    return Used(str(adapter.path), "adapter", adapter.store.nbytes, _dtypes(adapter.store), adapter.files, hashes)


def used_model(store: TensorStore, role: str) -> Used:
    """A model that an adapter was taken out of, or its base."""
    return Used(str(store.path), role, store.nbytes, _dtypes(store), store.files, {})


def _dtypes(store: TensorStore) -> tuple[str, ...]:
    return tuple(sorted({info.dtype for info in store.tensors.values()}))


def merge_files(recipe: Mapping[str, Any], used: Sequence[Used], base_model: str | None) -> Files:
    """The files beside an adapter that was merged from others.

    Args:
        recipe: that `pymerge merge` takes to do it again.
        used: the adapters.
        base_model: as they name it.
    """
    text = yaml_text(recipe)
    how = {"merge_method": recipe["merge_method"], "recipe": text}
    intro = f"LoRA adapters merged by the method `{recipe['merge_method']}` with pymerge {__version__}:"
    again = SAME_WEIGHTS.replace("models", "adapters")
    return _files("Merged LoRA adapter", intro, how, used, base_model, ["merge", "lora"], text, again, "pymerge merge recipe.yml OUT")


def extract_files(settings: Mapping[str, Any], used: Sequence[Used], base_model: str, command: str) -> Files:
    """The files beside an adapter that was taken out of a model.

    Args:
        settings: of the extraction.
        used: the model and its base.
        base_model: name of the base.
        command: that does it again.
    """
    intro = f"A LoRA adapter, extracted with pymerge {__version__} from what the first of these models changed in the other:"
    again = "With the same models, this makes the same weights:"
    return _files("Extracted LoRA adapter", intro, {"extract": dict(settings)}, used, base_model, ["lora"], None, again, command)


def _files(
    title: str, intro: str, how: Mapping[str, Any], used: Sequence[Used], base_model: str | None, tags: Sequence[str], recipe: str | None,
    again: str, command: str,
) -> Files:  # fmt: skip
    front = ["library_name: peft"]
    if base_model and is_hub_name(base_model):
        front += [f"base_model: {base_model}", "base_model_relation: adapter"]
    front += ["tags:", *(f"- {tag}" for tag in tags), "- pymerge"]
    page = card(front, title, intro, [one.on_card() for one in used], recipe, again, command)
    hashes = {file: digest for one in used for file, digest in one.hashes.items()}

    def files(tensors: int, layout: Layout) -> dict[str, bytes]:
        inputs = [(one.name, one.role, one.files) for one in used]
        return {FILE_NAME: provenance_file(how, inputs, hashes, tensors, layout), "README.md": page.encode()}

    return files
