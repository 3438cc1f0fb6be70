"""Spherical interpolation of two models (Shoemake 1985; for weights as in mergekit: tensor by tensor, each tensor one vector)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops, slice_ops
from ..arguments import finite
from ..conventions import Convention
from ..finite import raise_if_not_finite
from ..spec import MergeSpec
from ..tree import Paired
from .registry import Parameter, register_method
from .sliced import Sliced

__all__ = ["slerp"]

_SUM = Convention(divisor="none")
# Both as in mergekit. Closer than 1.8 degrees to one line, sin(theta) loses its digits and the arc is a chord; a shorter vector than
# 1e-8 has no direction worth the name.
_COLLINEAR = 0.9995
_NO_LENGTH = 1e-8


def slerp(
    a: Any,
    b: Any,
    *,
    t: float,
    dtype: torch.dtype | None = None,
    out: Any = None,
    check_finite: bool = True,
) -> Any:
    """Go from a (t = 0) to b (t = 1) along the arc between them: ``(sin((1-t)θ) a + sin(tθ) b) / sin θ``, θ the angle of a and b.

    Each tensor is one vector. Almost parallel or opposite vectors (``|cos θ| > 0.9995``), and ones whose angle is not a number, are
    interpolated linearly. Norms and the angle are fp64 sums; the two coefficients are rounded to the compute dtype once.

    Args:
        a, b: two tensors, two mappings name -> tensor or two nn.Modules.
        t: where on the arc; values outside [0, 1] go on along the circle.
        dtype, out, check_finite: as in :func:`pymerge.ties`.

    Returns and raises: as :func:`pymerge.ties`.
    """
    t = finite(t, "t")
    pairs = Paired(a, [b], labels=("a", "b"), needs_base="slerp")

    def merge_one(name: str, x: Tensor, ys: list[Tensor], dtype: torch.dtype, to: Tensor | None) -> Tensor:
        return _arc(x, ys[0], t, ("a", "b"), name, dtype, to, check_finite)

    return pairs.result(merge_one, dtype=dtype, out=out)


def _coefficients(aa: float, bb: float, ab: float, t: float) -> tuple[float, float]:
    """What a and b are multiplied with, from a·a, b·b and a·b."""
    length_a, length_b = math.sqrt(aa), math.sqrt(bb)
    cosine = ab / (length_a if length_a > _NO_LENGTH else 1.0) / (length_b if length_b > _NO_LENGTH else 1.0)
    if not abs(cosine) <= _COLLINEAR:  # not: also for NaN
        return 1.0 - t, t
    theta = math.acos(cosine)
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _arc(a, b, t, labels, name, dtype, out, check_finite) -> Tensor:
    sums = ops.dots(a, b).tolist()
    if check_finite and not all(map(math.isfinite, sums)):  # a NaN or an infinity shows in the sums; so may an overflow of fp64
        raise_if_not_finite(zip(labels, (a, b)), name)
    spec = MergeSpec(_coefficients(*sums, t), (1.0, 1.0), convention=_SUM)
    return ops.merge(None, [a, b], spec, name=name, dtype=dtype, out=out, check_finite=False)


class _Slices(Sliced):
    """The dot products in a pass of their own."""

    passes = 1

    def begin(self, number, read) -> None:
        self._sums = {name: [0.0] * 3 for name in self.tensors}

    def add(self, number, name, first, base, models) -> None:
        self._sums[name] = slice_ops.dots(base, models[0], self._sums[name])

    def merge(self, name, first, base, models, out, check_finite) -> None:
        tensor = self.tensors[name]
        if check_finite and not all(map(math.isfinite, self._sums[name])):
            raise_if_not_finite([("base", base), ("model 0", models[0])], name, first=first, shape=tensor.shape)
        coefficients = _coefficients(*self._sums[name], finite(tensor.parameters["t"], "t"))
        spec = MergeSpec(coefficients, (1.0, 1.0), convention=_SUM)
        slice_ops.merge(None, [base, models[0]], spec, out, name=name, first=first, shape=tensor.shape, check_finite=False)


@register_method(
    "slerp",
    base="required",
    max_models=1,
    summary="spherical interpolation from the base to one model",
    source="Shoemake 1985, doi:10.1145/325165.325242",
    parameters=(Parameter("t", recipe="t", kind=float, doc="0 is the base, 1 the model"),),
    sliced=_Slices,
)
def _tensor(base: Tensor, models: list[Tensor], *, t, name, dtype, out, check_finite) -> Tensor:
    return _arc(base, models[0], finite(t, "t"), ("base", "model 0"), name, dtype, out, check_finite)
