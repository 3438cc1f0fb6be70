"""How far a model has moved from its base."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from .models import common_tensors, open_model
from .scan import scan
from .statistics import Statistics, pool

__all__ = ["Drift", "WeightDrift", "layer_group", "weight_drift"]


def layer_group(name: str) -> str:
    """The name up to and with its first number, "model.layers.3", or without a number its first part."""
    match = re.match(r"(?:.*?\.)??\w*?\.?\d+(?=\.|$)", name)
    return match.group(0) if match else name.split(".", 1)[0] or "all"


@dataclass(frozen=True)
class Drift:
    """Of one tensor, or of several as one vector.

    Attributes:
        norm: ||tuned - base||.
        relative: that by ||base||.
        cosine: between tuned and base.
        largest: max |tuned - base|.
        changed: share of the elements that differ.
        numel: elements.
    """

    norm: float
    relative: float
    cosine: float
    largest: float
    changed: float
    numel: int

    @classmethod
    def of(cls, s: Statistics, i: int = 0) -> Drift:
        """From the statistics of model i."""
        return cls(s.norm(i), s.relative(i), s.weight_cosine(i), s.largest(i), s.changed(i) / max(s.numel, 1), s.numel)


@dataclass(frozen=True)
class WeightDrift:
    """What :func:`weight_drift` found.

    Attributes:
        total: over all tensors.
        groups: by layer.
        tensors: by name.
        skipped: tensors that could not be compared, and why.
    """

    total: Drift
    groups: dict[str, Drift]
    tensors: dict[str, Drift]
    skipped: tuple[str, ...]

    def top(self, k: int = 10) -> list[tuple[str, Drift]]:
        """The k tensors that moved most relative to their size."""
        return sorted(self.tensors.items(), key=lambda item: -item[1].relative)[:k]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "total": plain(vars(self.total)),
            "groups": {k: plain(vars(v)) for k, v in self.groups.items()},
            "tensors": {k: plain(vars(v)) for k, v in self.tensors.items()},
            "skipped": list(self.skipped),
        }

    def to_text(self) -> str:
        """In words, with the tensors that moved most."""
        t = self.total
        lines = [
            f"moved by {t.relative:.3%} of the base's norm ({t.norm:.4g}); {t.changed:.1%} of the elements changed; cosine {t.cosine:.6f}"
        ]
        lines += [f"  {d.relative:10.3%}  {name or 'the tensor'}" for name, d in self.top()]
        lines += [f"  not compared: {reason}" for reason in self.skipped]
        return "\n".join(lines) + "\n"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as None: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def weight_drift(base: Any, tuned: Any, *, threads: int | None = None) -> WeightDrift:
    """||tuned - base||, absolute and relative to ||base||, per tensor, per layer and in all, in one pass.

    A small drift alone does not mean that little was forgotten: norms of the weight change did not explain forgetting where KL on the new
    task did (Shenfeld et al. 2025, arXiv:2509.04259).

    Args:
        base, tuned: tensors, mappings name -> tensor, nn.Modules, or paths of checkpoints.
        threads: see :func:`pymerge.diagnostics.scan.scan`.

    Raises:
        ValueError: no tensor in common. CheckpointError, NonFiniteError, TypeError: a model cannot be read.
    """
    models = open_model(base, "base"), open_model(tuned, "tuned")
    common = common_tensors(models)
    if not common.names:
        raise ValueError("base and tuned have no tensor in common")
    found = scan(models[0], models[1:], common.names, threads=threads)
    groups: dict[str, list[Statistics]] = {}
    for name, s in found.items():
        groups.setdefault(layer_group(name), []).append(s)
    return WeightDrift(
        Drift.of(pool(found.values(), 1)),
        {name: Drift.of(pool(parts, 1)) for name, parts in groups.items()},
        {name: Drift.of(s) for name, s in found.items()},
        common.problems,
    )
