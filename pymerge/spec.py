"""What one fused merge computes: the arguments that every backend takes, checked once."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from .conventions import Convention, kept_count

__all__ = ["MAX_MODELS", "MergeSpec", "tensor_id"]

MAX_MODELS = 64


def tensor_id(name: str) -> int:
    """32-bit id of a tensor for the random-number counter: the first four bytes (little endian) of BLAKE2s of its name, 0 for no name."""
    return int.from_bytes(hashlib.blake2s(name.encode()).digest()[:4], "little") if name else 0


@dataclass(frozen=True)
class MergeSpec:
    """``out = base + scale * combine_i(weights[i] * sparsify_i(model_i - base))``, with every choice made.

    Attributes:
        weights: one per model.
        densities: fraction kept, one per model, in [0, 1]; ignored when `sparsify` is ``"none"``.
        sparsify: ``"none"``, ``"magnitude"`` (the k largest magnitudes), ``"band"`` (the k largest after the very largest) or
            ``"bernoulli"`` (each element with probability density).
        elect: whether a sign is elected per element and only agreeing models are combined.
        convention: the details, see :class:`pymerge.Convention`. `scope` is the caller's business: a backend sees one tensor.
        scale: multiplies the combined delta.
        seed: 64-bit key of the Bernoulli draws.
        gammas: fraction of the largest magnitudes that a band leaves out, one per model, in [0, 1].
    """

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    sparsify: str = "none"
    elect: bool = False
    convention: Convention = Convention()
    scale: float = 1.0
    seed: int = 0
    gammas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.weights)
        if not 1 <= count <= MAX_MODELS:
            raise ValueError(f"{count} models given; a merge takes 1 to {MAX_MODELS}")
        if len(self.densities) != count:
            raise ValueError(f"{len(self.densities)} densities for {count} models")
        for i, (weight, density) in enumerate(zip(self.weights, self.densities, strict=True)):
            if not math.isfinite(weight):
                raise ValueError(f"weight of model {i} is {weight}; weights must be finite")
            if not 0.0 <= density <= 1.0:
                raise ValueError(f"density of model {i} is {density}; density is the fraction kept, between 0 and 1")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; it must be finite")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and 2**64 - 1")
        if self.sparsify not in ("none", "magnitude", "band", "bernoulli"):
            raise ValueError(f"sparsify is {self.sparsify!r}; choose 'none', 'magnitude', 'band' or 'bernoulli'")
        if len(self.gammas) != (count if self.sparsify == "band" else 0):
            raise ValueError(f"{len(self.gammas)} gammas for {count} models and sparsify {self.sparsify!r}; a band takes one per model")
        for i, gamma in enumerate(self.gammas):
            if not 0.0 <= gamma <= 1.0:
                raise ValueError(f"gamma of model {i} is {gamma}; gamma is the fraction of the largest left out, between 0 and 1")

    @property
    def trims(self) -> bool:
        """Whether any element can be left out by magnitude."""
        return self.sparsify == "magnitude" and any(density < 1.0 for density in self.densities)

    def counts(self, n: int) -> list[list[int]]:
        """How many of `n` elements are among each model's largest: ``[kept]`` for ``"magnitude"``, ``[kept or larger, larger]`` for a band.

        A band of k elements lies below the int(gamma * n) largest, and higher up where fewer than k elements are left there.
        """
        kept = [kept_count(density, n, self.convention.k) for density in self.densities]
        if self.sparsify != "band":
            return [kept]
        larger = [min(int(gamma * n), n - k) for gamma, k in zip(self.gammas, kept, strict=True)]
        return [[k + top for k, top in zip(kept, larger, strict=True)], larger]
