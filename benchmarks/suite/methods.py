"""Each method as pymerge has it, and the oracle's part of its result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pymerge
from pymerge import Convention, diagnose_ops, reference
from pymerge.spec import MergeSpec

from .inputs import Inputs, tensors

__all__ = ["ALPHA", "DECAY", "DENSITY", "METHODS", "SEED", "Method"]

DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}
SCALE, ALPHA, DECAY, SEED = 0.4, 0.5, 0.999, 7

# Which elements are kept of one tensor: rows (key, cut) per model, see pymerge.reference.select.
Selection = Tensor | None


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        run: merges into ``inputs.out``; the second argument is the density.
        spec: the fused merge that its result must be, given the inputs of one tensor and the density; None where there is no such merge.
        models: how many it takes at most.
        reads_base: whether it reads the base.
        updates: it changes ``inputs.out``, which is fp32 then, and has no other output.
        writes: whether it has an output; the diagnosis has none.
    """

    run: Callable[[Inputs, float], object]
    spec: Callable[[Tensor, list[Tensor], float], MergeSpec] | None = None
    models: int | None = None
    reads_base: bool = True
    updates: bool = False
    writes: bool = True

    def prepared(self, inputs: Inputs) -> Inputs:
        """The inputs that it takes of these."""
        inputs = inputs.first(self.models or len(inputs.models))
        if not self.updates:
            return inputs
        average = inputs.base.float() if isinstance(inputs.base, Tensor) else {k: x.float() for k, x in inputs.base.items()}
        return Inputs(inputs.base, inputs.models, average, inputs.layout, inputs.dtype)

    def traffic(self, inputs: Inputs) -> tuple[int, int]:
        """The compulsory bytes, every input read once and the output written once, and how many streams are read."""
        streams = [*inputs.models, *([inputs.base] if self.reads_base else []), *([inputs.out] if self.updates else [])]
        moved = sum(x.nbytes for stream in [*streams, *([inputs.out] if self.writes else [])] for x in tensors(stream))
        return moved, len(streams)


def _fused(convention: str | Convention, sparsify: str = "none", elect: bool = False, weight: float = 1.0):
    def spec(base: Tensor, models: list[Tensor], density: float) -> MergeSpec:
        count = len(models)
        c = convention if isinstance(convention, Convention) else Convention.resolve("default", convention)
        return MergeSpec((weight,) * count, (density,) * count, sparsify, elect, c, 1.0, SEED if sparsify == "bernoulli" else 0)

    return spec


def _arc(base: Tensor, models: list[Tensor], density: float) -> MergeSpec:
    """Shoemake's coefficients, for vectors neither parallel nor zero; base and model are the two models of a merge without a base."""
    aa, bb, ab = reference.dots(base, models[0]).tolist()
    theta = math.acos(ab / math.sqrt(aa) / math.sqrt(bb))
    coefficients = math.sin((1 - ALPHA) * theta) / math.sin(theta), math.sin(ALPHA * theta) / math.sin(theta)
    return MergeSpec(coefficients, (1.0, 1.0), convention=_SUM)


_MEAN, _SUM = Convention(divisor="weights", rescale="none"), Convention(divisor="none", rescale="none")


def diagnosis(inputs: Inputs, density: float) -> tuple[Tensor, Tensor]:
    """Sums and counts over all tensors, with |delta| > 0.001 kept."""
    bound = torch.tensor(1e-3).view(torch.int32).item()
    count = len(inputs.models)
    sums, counts = diagnose_ops.new_statistics(count)
    names = [None] if isinstance(inputs.out, Tensor) else list(inputs.out)
    for name in names:
        base, *models = (x if name is None else x[name] for x in (inputs.base, *inputs.models))
        diagnose_ops.diagnose(base, models, torch.tensor([[bound, -1]] * count), sums, counts)
    return sums, counts


METHODS: dict[str, Method] = {
    "linear": Method(lambda w, d: pymerge.linear(w.models, out=w.out), _fused(_MEAN), reads_base=False),
    "task_arithmetic": Method(
        lambda w, d: pymerge.task_arithmetic(w.base, w.models, [SCALE] * len(w.models), out=w.out), _fused(_SUM, weight=SCALE)
    ),
    "wise_ft": Method(lambda w, d: pymerge.wise_ft(w.base, w.models[0], alpha=ALPHA, out=w.out), models=1),
    "ema": Method(
        lambda w, d: pymerge.ema_update(w.out, w.models[0], decay=DECAY), models=1, reads_base=False, updates=True
    ),
    "slerp": Method(lambda w, d: pymerge.slerp(w.base, w.models[0], t=ALPHA, out=w.out), _arc, models=1),
    "ties": Method(lambda w, d: pymerge.ties(w.base, w.models, density=d, out=w.out), _fused("ties", "magnitude", True)),
    "dare_linear": Method(
        lambda w, d: pymerge.dare_linear(w.base, w.models, density=d, seed=SEED, out=w.out), _fused("dare_linear", "bernoulli")
    ),
    "dare_ties": Method(
        lambda w, d: pymerge.dare_ties(w.base, w.models, density=d, seed=SEED, out=w.out), _fused("dare_ties", "bernoulli", True)
    ),
    "diagnose": Method(diagnosis, writes=False),
}  # fmt: skip


def oracle(
    method: str, base: Tensor, models: list[Tensor], before: Tensor, spec: MergeSpec | None, name: str, selection: Selection, first: int
) -> Tensor:
    """A part of one tensor's result by the reference, from the elements of that part alone.

    Args:
        method: of :data:`METHODS`, one with an output.
        base, models: the part's elements.
        before: what the output held before, its dtype the result's.
        spec: what the whole tensor's inputs gave.
        name: the tensor's, "" for a bare one.
        selection: the whole tensor's.
        first: the part's first element.
    """
    if method in ("wise_ft", "ema"):
        a, alpha = (base, ALPHA) if method == "wise_ft" else (before, 1.0 - DECAY)
        return reference.lerp(a, models[0], alpha, before.dtype)
    given = (None, [base, *models]) if method == "slerp" else (None if method == "linear" else base, models)
    return reference.merge(*given, spec, name=name, selection=selection, first=first, dtype=before.dtype)
