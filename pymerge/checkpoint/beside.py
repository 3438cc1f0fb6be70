"""The small files that a merge writes beside the weights, by its plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .extras import CardInput, config_with_dtype, files_to_copy, model_card, read_small

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["card_of", "extra_files"]

TITLE = "Merged model"
"""Of the model card: not the output's name, because the same merge writes the same files wherever it writes them."""


def extra_files(plan: Plan) -> dict[str, bytes]:
    """Name -> content of everything beside the weights but pymerge.json.

    Raises:
        CheckpointError: a file of the donor cannot be read.
    """
    content = {path.name: read_small(path) for path in files_to_copy(plan.donor)}
    if plan.alignment is not None:
        content = plan.alignment.replace(content)
    plan.changes.apply(content)
    if "config.json" in content:
        content["config.json"] = config_with_dtype(content["config.json"], _main_dtype(plan))
    content["README.md"] = card_of(plan, "config.json" in content, {})
    return content


def card_of(plan: Plan, transformers: bool, digests: Mapping[Path, str]) -> bytes:
    """README.md; `digests` are the SHA-256 of inputs, as far as known."""
    inputs = [
        CardInput(
            name,
            index in plan.bases,
            store.nbytes,
            tuple(sorted({info.dtype for info in store.tensors.values()})),
            tuple((file.name, digests[file]) for file in store.files if file in digests),
        )
        for index, (name, store) in enumerate(zip(plan.names, plan.checkpoints, strict=True))
    ]
    return model_card(plan.recipe, TITLE, inputs, transformers).encode()


def _main_dtype(plan: Plan) -> str:
    """The dtype of most of the output's bytes."""
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        if not tensor.copied:
            sizes[tensor.output.dtype] = sizes.get(tensor.output.dtype, 0) + tensor.output.nbytes
    return max(sizes, key=lambda code: (sizes[code], code)) if sizes else "F32"
