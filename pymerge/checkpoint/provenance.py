"""pymerge.json: how an output was made, for `pymerge verify` and for people. The same merge writes the same bytes, wherever it is run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .extras import read_small
from .format import CheckpointError, load_json

if TYPE_CHECKING:
    from .layout import Layout
    from .plan import Plan
    from .reader import Checkpoint

__all__ = ["FILE_NAME", "Provenance", "parse_inputs", "provenance", "provenance_file", "read_provenance"]

FILE_NAME = "pymerge.json"


def provenance(plan: Plan, hashes: Mapping[Path, str]) -> bytes:
    """The file's content. No dates and no paths but the recipe's: files are named within their models.

    Args:
        plan: that was carried out.
        hashes: SHA-256 of inputs, as far as known.
    """
    stores = enumerate(zip(plan.names, plan.checkpoints, strict=True))
    inputs = [(name, "base" if index in plan.bases else "model", store.files) for index, (name, store) in stores]
    how = {"merge_method": plan.method.name, "recipe": plan.recipe.to_yaml()}
    return provenance_file(how, inputs, hashes, len(plan.tensors), plan.layout)


def provenance_file(
    how: Mapping[str, Any], inputs: Sequence[tuple[str, str, Sequence[Path]]], hashes: Mapping[Path, str], tensors: int, layout: Layout
) -> bytes:
    """The content of pymerge.json.

    Args:
        how: it was made: the method and the recipe, say.
        inputs: (model, its role, its files).
        hashes: SHA-256 of files, as far as known.
        tensors: how many were written.
        layout: where.
    """

    def entry(file: Path) -> dict[str, Any]:
        known = {"sha256": hashes[file]} if file in hashes else {}
        return {"name": file.name, "bytes": file.stat().st_size, **known}

    content = {
        "pymerge_version": __version__,
        **how,
        "inputs": [{"model": name, "role": role, "files": [entry(file) for file in files]} for name, role, files in inputs],
        "output": {
            "tensors": tensors,
            "bytes": layout.total_size,
            "files": [{"name": shard.file_name, "bytes": shard.size} for shard in layout.shards],
        },
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Provenance:
    """How an output says it was made.

    Attributes:
        version: of pymerge.
        recipe: YAML text.
        inputs: (model as the recipe names it, [(file name, bytes, SHA-256 or None)]); empty where only the weights' metadata is there.
        source: where this was read from.
    """

    version: str
    recipe: str
    inputs: tuple[tuple[str, tuple[tuple[str, int, str | None], ...]], ...]
    source: Path


def read_provenance(output: Checkpoint) -> Provenance:
    """From pymerge.json beside the weights, or else from the weights' own metadata.

    Raises:
        CheckpointError: there is neither, or it is malformed.
    """
    path = output.folder / FILE_NAME if output.folder is not None else None
    if path is not None and path.is_file():
        return _parse(load_json(read_small(path), str(path)), path)
    metadata = output.headers[0].metadata
    if "pymerge_recipe" not in metadata:
        missing = f"it has no {FILE_NAME}, and no pymerge_recipe in its metadata; what pymerge wrote has one"
        raise CheckpointError(f"{output.path}: does not say how it was made: {missing}")
    return Provenance(metadata.get("pymerge_version", "(unknown)"), metadata["pymerge_recipe"], (), output.headers[0].file)


def _parse(content: Any, path: Path) -> Provenance:
    inputs = parse_inputs(content, path)
    recipe = content.get("recipe")
    if not isinstance(recipe, str):
        raise CheckpointError(f"{path}: its recipe is not text")
    return Provenance(str(content["pymerge_version"]), recipe, inputs, path)


def parse_inputs(content: Any, path: Path) -> tuple[tuple[str, tuple[tuple[str, int, str | None], ...]], ...]:
    """What a pymerge.json says of its inputs, as :class:`Provenance` has it.

    Raises:
        CheckpointError: it is malformed.
    """
    try:
        content["pymerge_version"]
        return tuple(
            (str(i["model"]), tuple((str(f["name"]), int(f["bytes"]), f.get("sha256")) for f in i["files"])) for i in content["inputs"]
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not as pymerge writes it: {type(error).__name__}: {error}") from None
