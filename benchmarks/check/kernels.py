"""The inner loops that are watched: calls of the C++ backend, as the methods make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge import Convention, native, native_diagnose, native_kl
from pymerge.diagnose_ops import new_statistics
from pymerge.spec import MergeSpec
from pymerge.speed.weights import Weights

__all__ = ["KERNELS", "Kernel", "Tensors"]


class Tensors:
    """What the calls of one size read and write: bf16, three models."""

    def __init__(self, n: int) -> None:
        self.n = n
        weights = Weights.random(n, torch.bfloat16)
        self.base, self.models, self.out = weights.base, weights.models, weights.out
        self.average = weights.base.float()
        # 64 rows at least, so that what a row costs does not hide what an element costs
        self.student, self.teacher = ((x.float() * 150).bfloat16().view(-1, min(n // 64, 32_768)) for x in weights.models[:2])
        rows = self.student.shape[0]
        self.gradient = self.out.view(self.student.shape)
        self.stats, self.weight = torch.zeros(rows, 6), torch.ones(rows)
        self.selection = torch.tensor([[torch.tensor(1e-3).view(torch.int32).item(), -1]] * 3)
        self.statistics = new_statistics(3)

    def all(self) -> Iterator[Tensor]:
        yield from (self.base, *self.models, self.out, self.average, self.student, self.teacher, self.stats, self.weight, *self.statistics)


@dataclass(frozen=True)
class Kernel:
    """A call, and the bytes per element that it has to read and write."""

    run: Callable[[Tensors], object]
    bytes: int


def _merge(sparsify: str, elect: bool, density: float, convention: Convention, base: bool = True) -> Kernel:
    spec = MergeSpec((1.0,) * 3, (density,) * 3, sparsify, elect, convention, 1.0, 7 if sparsify == "bernoulli" else 0)
    return Kernel(lambda t: native.merge(t.base if base else None, t.models, spec, t.out), 10 if base else 8)


KERNELS: dict[str, Kernel] = {
    "linear": _merge("none", False, 1.0, Convention(divisor="weights"), base=False),
    "task_arithmetic": _merge("none", False, 1.0, Convention(divisor="none")),
    "ties": _merge("magnitude", True, 0.2, Convention.resolve("default", "ties")),
    "dare_linear": _merge("bernoulli", False, 0.5, Convention.resolve("default", "dare_linear")),
    "dare_ties": _merge("bernoulli", True, 0.5, Convention.resolve("default", "dare_ties")),
    "wise_ft": Kernel(lambda t: native.lerp(t.base, t.models[0], 0.3, t.out), 6),
    "ema": Kernel(lambda t: native.lerp(t.average, t.models[0], 0.001, t.average), 10),
    "dots": Kernel(lambda t: native.dots(t.base, t.models[0]), 4),
    "kl forward": Kernel(lambda t: native_kl.forward(t.student, t.teacher, "forward"), 4),
    "kl gradient": Kernel(lambda t: native_kl.backward(t.student, t.teacher, t.stats, t.weight, "forward", out=t.gradient), 6),
    "diagnose": Kernel(lambda t: native_diagnose.diagnose(t.base, t.models, t.selection, *t.statistics, 1), 8),
}  # fmt: skip
