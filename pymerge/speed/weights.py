"""Tensors to time merges with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Weights"]


@dataclass
class Weights:
    """A base ~ N(0, 0.02) and models about 0.002 away from it, as weights of language models are; `out` takes the result."""

    base: Tensor
    models: Sequence[Tensor]
    out: Tensor

    @classmethod
    def random(cls, n: int, dtype: torch.dtype, models: int = 3) -> Weights:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(n, generator=generator).mul_(0.02)
        tuned = [torch.randn(n, generator=generator).mul_(0.002).add_(base).to(dtype) for _ in range(models)]
        return cls(base.to(dtype), tuned, torch.zeros(n, dtype=dtype))

    def part(self, where: slice) -> Weights:
        return Weights(self.base[where], [x[where] for x in self.models], self.out[where].clone())
