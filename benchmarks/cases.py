"""What is timed: each method as pymerge has it, the same in naive torch, and the check that a result must pass before its speed counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import baselines
import torch
from torch import Tensor

import pymerge
from pymerge import reference
from pymerge.speed.weights import Weights

DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}
SCALE, ALPHA, DECAY, SEED = 0.4, 0.5, 0.999, 7


@dataclass(frozen=True)
class Case:
    """One method.

    Attributes:
        ours: runs pymerge into ``w.out``.
        naive: the baseline, a new tensor.
        models: how many models it reads.
        reads_base: whether it reads the base too.
        running_average: it changes ``w.out``, which is kept in fp32, in place.
    """

    ours: Callable[[Weights], object]
    naive: Callable[[Weights], Tensor]
    models: int = 3
    reads_base: bool = True
    running_average: bool = False

    def prepared(self, w: Weights) -> Weights:
        return replace(w, out=w.out.float()) if self.running_average else w

    def bytes_moved(self, w: Weights) -> int:
        """The compulsory traffic: every input read once, the output written once."""
        read = [*w.models[: self.models], *([w.base] if self.reads_base else []), *([w.out] if self.running_average else [])]
        return sum(x.nbytes for x in read) + w.out.nbytes


CASES: dict[str, Case] = {
    "linear": Case(lambda w: pymerge.linear(w.models, out=w.out), lambda w: baselines.linear(w.models), reads_base=False),
    "task_arithmetic": Case(
        lambda w: pymerge.task_arithmetic(w.base, w.models, [SCALE] * 3, out=w.out),
        lambda w: baselines.task_arithmetic(w.base, w.models, SCALE),
    ),
    "ties": Case(
        lambda w: pymerge.ties(w.base, w.models, density=DENSITY["ties"], out=w.out),
        lambda w: baselines.ties(w.base, w.models, DENSITY["ties"]),
    ),
    "dare_linear": Case(
        lambda w: pymerge.dare_linear(w.base, w.models, density=DENSITY["dare_linear"], seed=SEED, out=w.out),
        lambda w: baselines.dare_linear(w.base, w.models, DENSITY["dare_linear"]),
    ),
    "dare_ties": Case(
        lambda w: pymerge.dare_ties(w.base, w.models, density=DENSITY["dare_ties"], seed=SEED, out=w.out),
        lambda w: baselines.dare_ties(w.base, w.models, DENSITY["dare_ties"]),
    ),
    "wise_ft": Case(
        lambda w: pymerge.wise_ft(w.base, w.models[0], alpha=ALPHA, out=w.out),
        lambda w: baselines.wise_ft(w.base, w.models[0], ALPHA),
        models=1,
    ),
    "ema": Case(
        lambda w: pymerge.ema_update(w.out, w.models[0], decay=DECAY),
        lambda w: baselines.ema(w.out, w.models[0], DECAY),
        models=1,
        reads_base=False,
        running_average=True,
    ),
    "slerp": Case(
        lambda w: pymerge.slerp(w.base, w.models[0], t=ALPHA, out=w.out), lambda w: baselines.slerp(w.base, w.models[0], ALPHA), models=1
    ),
}


# --------------------------------------------------------------------------------------------------------------------------------------
# Checking

BLOCK = 65536


def check(name: str, w: Weights) -> None:
    """Leaves the result in ``w.out``.

    The first 70001 elements alone must give the reference's bits; the whole must be the baseline's result but for rounding.

    Raises:
        AssertionError: it is wrong, and where.
    """
    small = CASES[name]
    ours, oracle = w.part(slice(70001)), w.part(slice(70001))
    ours.out.copy_(ours.base)
    oracle.out.copy_(oracle.base)
    small.ours(ours)
    with pymerge.backend("reference"):
        small.ours(oracle)
    assert torch.equal(_bits(ours.out), _bits(oracle.out)), f"{name}: the first {ours.out.numel()} elements differ from the reference"

    w.out.copy_(w.base)
    if name in ("dare_linear", "dare_ties"):
        CASES[name].ours(w)
        n = w.out.numel()
        for start in {0, n // 2 // BLOCK * BLOCK, max(0, n - BLOCK)}:
            part = w.part(slice(start, start + BLOCK))
            masks = _philox_masks(start, part, DENSITY[name])
            _close(name, part.out, getattr(baselines, name)(part.base, part.models, DENSITY[name], masks))
        return
    # The baseline's slerp takes its angle from fp32 sums over all elements, which is good for speed but not for a check.
    expected = baselines.slerp(w.base, w.models[0], ALPHA, torch.float64) if name == "slerp" else CASES[name].naive(w)
    CASES[name].ours(w)
    # torch.topk keeps any of the elements at the k-th magnitude, pymerge the first: those may differ.
    _close(name, w.out, expected, _at_threshold(w, DENSITY["ties"]) if name == "ties" else None)


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


def _philox_masks(start: int, part: Weights, density: float) -> Tensor:
    stop, bound, device = start + part.out.numel(), round(density * 2**32), torch.device("cpu")
    return torch.stack([(reference.draws(start, stop, 0, i, SEED, device) < bound).float() for i in range(len(part.models))])


def _at_threshold(w: Weights, density: float) -> Tensor:
    at = torch.zeros(w.out.numel(), dtype=torch.bool)
    for x in w.models:
        magnitude = (x.float() - w.base.float()).abs()
        at |= magnitude == magnitude.kthvalue(magnitude.numel() - int(density * magnitude.numel()) + 1).values
    return at


def _close(name: str, got: Tensor, expected: Tensor, ignore: Tensor | None = None) -> None:
    ulp = 2.0**-7 if got.dtype == torch.bfloat16 else 2.0**-22
    wrong = (got.float() - expected.float()).abs() > ulp * expected.float().abs() + 1e-7
    if ignore is not None:
        wrong &= ~ignore
    # A vote whose terms cancel but for rounding may go either way when the sum is taken in another order.
    allowed = got.numel() // 10**6
    assert int(wrong.sum()) <= allowed, f"{name}: {int(wrong.sum())} of {got.numel()} elements differ from the baseline"
