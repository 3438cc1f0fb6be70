"""A column of a progressive network. Status: academic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ProgressiveColumn"]


class ProgressiveColumn(nn.Module):
    """A multilayer perceptron for one task that also sees the hidden layers of earlier tasks' columns, which are frozen (Rusu et al. 2016,
    arXiv:1606.04671, eq. 1): ``h_i = relu(W_i h_(i-1) + sum_j U_ij h_(i-1)^(j))``. Nothing is forgotten; the network grows with the square
    of the number of tasks.

    Args:
        sizes: of the input, the hidden layers and the output.
        earlier: columns of earlier tasks with the same input size and number of layers; they are frozen.
    """

    def __init__(self, sizes: Sequence[int], earlier: Sequence[ProgressiveColumn] = ()) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes are {list(sizes)}; at least those of input and output are needed")
        for number, column in enumerate(earlier):
            if len(column.sizes) != len(sizes) or column.sizes[0] != sizes[0]:
                raise ValueError(f"column {number} has sizes {list(column.sizes)}, this one {list(sizes)}: input and depth must agree")
        self.sizes = tuple(sizes)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.lateral = nn.ModuleList(
            nn.ModuleList(nn.Linear(column.sizes[i], sizes[i + 1], bias=False) for column in earlier) for i in range(1, len(self.layers))
        )
        self._earlier = tuple(earlier)  # a tuple, so that their parameters are not this module's
        for column in earlier:
            column.requires_grad_(False)

    def _hidden(self, x: Tensor) -> list[Tensor]:
        """The inputs of all layers, and the output."""
        with torch.no_grad():
            seen = [column._hidden(x) for column in self._earlier]
        hidden = [x]
        for i, layer in enumerate(self.layers):
            total = layer(hidden[-1])
            if i > 0:
                for lateral, column in zip(self.lateral[i - 1], seen):
                    total = total + lateral(column[i])
            hidden.append(total if i == len(self.layers) - 1 else torch.relu(total))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sizes[0]]`` to ``[batch, sizes[-1]]``."""
        return self._hidden(x)[-1]
