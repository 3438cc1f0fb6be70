"""Tensors to time merges with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Weights"]

_CHUNK = 2**24
"""Elements that are made at a time, so that a billion of them need no more memory than they take."""


@dataclass
class Weights:
    """A base ~ N(0, 0.02) and models about 0.002 away from it, as weights of language models are; `out` takes the result."""

    base: Tensor
    models: Sequence[Tensor]
    out: Tensor

    @classmethod
    def random(cls, n: int, dtype: torch.dtype, models: int = 3, model_dtypes: Sequence[torch.dtype] | None = None) -> Weights:
        """Of `n` elements, the same ones each time. `model_dtypes`: one per model, when they are not all the base's `dtype`."""
        dtypes = list(model_dtypes or [dtype] * models)
        generator = torch.Generator().manual_seed(0)
        base, tuned = torch.empty(n, dtype=dtype), [torch.empty(n, dtype=d) for d in dtypes]
        for start in range(0, n, _CHUNK):
            part = slice(start, min(n, start + _CHUNK))
            values = torch.randn(part.stop - start, generator=generator).mul_(0.02)
            base[part] = values
            for x in tuned:
                x[part] = torch.randn(part.stop - start, generator=generator).mul_(0.002).add_(values)
        return cls(base, tuned, torch.zeros(n, dtype=dtype))

    def part(self, where: slice) -> Weights:
        return Weights(self.base[where], [x[where] for x in self.models], self.out[where].clone())
