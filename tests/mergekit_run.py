"""mergekit as a program, in this process: importing it takes seconds."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

__all__ = ["merged_by_mergekit"]


def merged_by_mergekit(recipe: str, out: Path, **options) -> dict[str, torch.Tensor]:
    """The weights that mergekit makes of a recipe's text, in the current folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge

    # It keeps files open by the model's relative name, which another test may have used for another model.
    LoaderCache().loaders.clear()
    # Its loaders view mapped files: unwritten memory is not for it to fill.
    torch.utils.deterministic.fill_uninitialized_memory = False
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(recipe)), str(out), MergeOptions(write_model_card=False, quiet=True, **options)
    )
    return {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
