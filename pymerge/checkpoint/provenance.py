"""pymerge.json: how an output was made, for `pymerge verify` and for people. The same merge writes the same bytes, wherever it is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .extras import read_small
from .format import CheckpointError, load_json

if TYPE_CHECKING:
    from .plan import Plan
    from .reader import Checkpoint

__all__ = ["FILE_NAME", "Provenance", "provenance", "read_provenance"]

FILE_NAME = "pymerge.json"


def provenance(plan: Plan, hashes: Mapping[Path, str]) -> bytes:
    """The file's content. No dates and no paths but the recipe's: files are named within their models.

    Args:
        plan: that was carried out.
        hashes: SHA-256 of inputs, as far as known.
    """
    inputs = []
    for index, (name, store) in enumerate(zip(plan.names, plan.checkpoints, strict=True)):
        files = []
        for file in store.files:
            entry: dict[str, Any] = {"name": file.name, "bytes": file.stat().st_size}
            files.append({**entry, "sha256": hashes[file]} if file in hashes else entry)
        inputs.append({"model": name, "role": "base" if index in plan.bases else "model", "files": files})
    content = {
        "pymerge_version": __version__,
        "merge_method": plan.method.name,
        "recipe": plan.recipe.to_yaml(),
        "inputs": inputs,
        "output": {
            "tensors": len(plan.tensors),
            "bytes": plan.layout.total_size,
            "files": [{"name": shard.file_name, "bytes": shard.size} for shard in plan.layout.shards],
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
        raise CheckpointError(f"{output.path}: does not say how it was made: it has no {FILE_NAME}, and no pymerge_recipe in its metadata")
    return Provenance(metadata.get("pymerge_version", "(unknown)"), metadata["pymerge_recipe"], (), output.headers[0].file)


def _parse(content: Any, path: Path) -> Provenance:
    try:
        inputs = tuple(
            (str(i["model"]), tuple((str(f["name"]), int(f["bytes"]), f.get("sha256")) for f in i["files"])) for i in content["inputs"]
        )
        version, recipe = content["pymerge_version"], content["recipe"]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not as pymerge writes it: {type(error).__name__}: {error}") from None
    if not isinstance(recipe, str):
        raise CheckpointError(f"{path}: its recipe is not text")
    return Provenance(str(version), recipe, inputs, path)
