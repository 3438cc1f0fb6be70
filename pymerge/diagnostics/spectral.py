"""Measures of task vectors from the singular values of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Spectral", "spectral_measures"]


@dataclass(frozen=True)
class Spectral:
    """Of one matrix's task vectors, by model; NaN where one is zero.

    Attributes:
        effective_rank: exp(H(s / sum s)) of the singular values s (Roy and Vetterli 2007).
        stable_rank: ||tau||_F^2 / ||tau||_2^2.
        alignment: subspace alignment ratio ||U_k U_k^T tau_i||_F / ||tau_i||_F, U_k being the left singular vectors of the sum of all that
            hold 95 % of its Frobenius norm (Marczak et al. 2025, arXiv:2502.04959).
        singular_task_interference: ||(U^T U - I) S (V^T V - I)||_1 (sum of magnitudes) over the singular vectors of all models side by
            side, each cut to rank / models (Gargiulo et al. 2025, arXiv:2412.00081); 0 is none.
    """

    effective_rank: tuple[float, ...]
    stable_rank: tuple[float, ...]
    alignment: tuple[float, ...]
    singular_task_interference: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            key: [x if math.isfinite(x) else None for x in value] if isinstance(value, tuple) else value
            for key, value in vars(self).items()
        }


def spectral_measures(deltas: Sequence[Tensor]) -> Spectral:
    """The measures of fp32 matrices of one shape."""
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    effective, stable = [], []
    for _, s, _ in parts:
        total = float(s.sum())
        p = s[s > 0].double() / total if total else s[:0].double()
        effective.append(math.exp(-float((p * p.log()).sum())) if total else math.nan)
        stable.append(float((s.double() ** 2).sum() / s[0].double() ** 2) if total else math.nan)
    u, s, _ = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)
    energy = (s.double() ** 2).cumsum(0)
    k = int((energy < 0.95**2 * energy[-1]).sum()) + 1
    alignment = [float((u[:, :k].T @ d).norm() / d.norm()) if d.any() else math.nan for d in deltas]
    rank = max(1, min(deltas[0].shape) // len(deltas))
    left = torch.cat([p[0][:, :rank] for p in parts], 1)
    right = torch.cat([p[2][:rank] for p in parts], 0)
    values = torch.cat([p[1][:rank] for p in parts])
    eye = torch.eye(len(values))
    conflict = ((left.T @ left - eye) * values) @ (right @ right.T - eye)
    return Spectral(tuple(effective), tuple(stable), tuple(alignment), float(conflict.abs().sum()))
