"""Passthrough: one model as it is, or scaled; for recipes that take layers from several models."""

from __future__ import annotations

from torch import Tensor

from .. import ops, slice_ops
from ..conventions import Convention
from ..finite import raise_if_not_finite
from ..spec import MergeSpec
from .registry import Parameter, register_method
from .sliced import Sliced

__all__: list[str] = []

_SUM = Convention(divisor="none")


class _Slices(Sliced):
    def merge(self, name, first, base, models, out, check_finite) -> None:
        tensor = self.tensors[name]
        scale, place = tensor.parameters["scale"], {"first": first, "shape": tensor.shape}
        if scale[0] == 1.0 and out.dtype == models[0].dtype:
            if check_finite:
                raise_if_not_finite([("model 0", models[0])], name, **place)
            out.copy_(models[0])
        else:
            spec = MergeSpec(scale, (1.0,), convention=_SUM)
            slice_ops.merge(None, models, spec, out, name=name, check_finite=check_finite, **place)


@register_method(
    "passthrough",
    base="model",
    max_models=1,
    summary="the one model, unchanged or times scale",
    parameters=(Parameter("scale", recipe="scale", kind=float, default=1.0, per_model=True, doc="multiplies the model"),),
    sliced=_Slices,
)
def _tensor(base: None, models: list[Tensor], *, scale, name, dtype, out, check_finite) -> Tensor:
    if scale[0] == 1.0 and dtype == models[0].dtype:
        if check_finite:
            raise_if_not_finite([("model 0", models[0])], name)
        # A copy keeps -0, which adding to the sum's +0 does not.
        return models[0].clone() if out is None else out.copy_(models[0])
    return ops.merge(None, models, MergeSpec(scale, (1.0,), convention=_SUM), name=name, dtype=dtype, out=out, check_finite=check_finite)
