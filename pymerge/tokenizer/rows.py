"""Which row of which model stands for each token of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint.vocabulary import MEAN, PADDING, ZERO, Rows

__all__ = ["Override", "ids_in_models", "rows_of_models"]


@dataclass(frozen=True)
class Override:
    """What a recipe says about one token: `row` of `model`, zeros, or the general rule; `force`: for the models that have the token too."""

    kind: Literal["row", "zero", "rule"]
    model: int = -1
    row: int = -1
    force: bool = False


def ids_in_models(tokens: Mapping[str, int], vocabularies: Sequence[tuple[Mapping[str, int], int]]) -> Tensor:
    """int64 [models, size]: the row of each token of the output in each model, -1 where it has none.

    Args:
        tokens: of the output: token -> id.
        vocabularies: of each model: token -> id, and how many rows its embedding has.
    """
    size = max(tokens.values(), default=-1) + 1
    order = torch.tensor(list(tokens.values()), dtype=torch.int64)
    result = torch.full((len(vocabularies), size), -1, dtype=torch.int64)
    for line, (ids, rows) in zip(result, vocabularies, strict=True):
        found = torch.tensor([ids.get(token, -1) for token in tokens], dtype=torch.int64)
        line[order] = torch.where(found < rows, found, -1)
    return result


def rows_of_models(ids: Tensor, base: int | None, overrides: Mapping[int, Override], used: Tensor, size: int) -> list[Rows]:
    """The rows of every model's re-ordered tensor.

    A model that has a token keeps its row. One that lacks it takes what the recipe says, else the row of the only model that has it, else
    the base's, else the mean of the rows of those that have it, else zeros: a token that a model knows nothing of pulls the merge nowhere.

    Args:
        ids: int64 [models, n]: row of each token in each model, -1 where it has none.
        base: which of the models is the base.
        overrides: by id.
        used: bool [n]: the ids that are tokens; others, and ids from n on, are padding.
        size: number of rows of the output.
    """
    has = ids >= 0
    count = has.sum(0)
    first = has.int().argmax(0)  # the first model that has it
    by_base = has[base] if base is not None else torch.zeros_like(used)
    source = torch.where(count > 1, MEAN, torch.where(count == 1, first, ZERO))
    source = torch.where((count > 1) & by_base, base if base is not None else ZERO, source)
    row = ids.gather(0, source.clamp(min=0).unsqueeze(0)).squeeze(0)
    forced = torch.zeros_like(used)
    for token, override in overrides.items():
        if override.kind != "rule":
            source[token] = override.model if override.kind == "row" else ZERO
            row[token] = override.row
        forced[token] = override.force
    means = (source == MEAN).nonzero().flatten()
    row[means] = torch.arange(len(means))
    members = ids[:, means]
    result = []
    for model in range(len(ids)):
        own = has[model] & ~forced
        full_source = torch.full((size,), PADDING, dtype=torch.int64)
        full_row = torch.zeros(size, dtype=torch.int64)
        full_source[: len(used)] = torch.where(used, torch.where(own, model, source), PADDING)
        full_row[: len(used)] = torch.where(own, ids[model], row)
        result.append(Rows(full_source, full_row, members))
    return result
