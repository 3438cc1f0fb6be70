"""The list of merge methods: what recipes, the command line and `pymerge.methods()` know about each.

A method is a plain function that merges one tensor, registered with the parameters that a recipe may give it::

    @register_method(
        "halfway",
        base="required",
        max_models=1,
        summary="the point halfway between base and model",
        parameters=(Parameter("scale", recipe="lambda", kind=float, default=1.0, doc="multiplies the delta"),),
    )
    def halfway(base, models, *, scale, name, dtype, out, check_finite):
        return (base + 0.5 * scale * (models[0] - base)).to(dtype)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..spec import MAX_MODELS
from .sliced import MakeSliced

__all__ = ["REQUIRED", "Method", "Parameter", "get_method", "methods", "register_method"]


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: keyword of the function.
        recipe: its key under ``parameters`` in a recipe (mergekit's name where mergekit has it).
        kind: float, int, bool or str.
        default: what a recipe that does not give it gets; REQUIRED makes that an error.
        per_model: the function gets a tuple with one value per model, and a recipe may give it per model.
        doc: one line.
    """

    name: str
    recipe: str
    kind: type
    default: Any = REQUIRED
    per_model: bool = False
    doc: str = ""


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: as in a recipe's ``merge_method``.
        tensor: ``tensor(base, models, *, name, dtype, out, check_finite, **parameters) -> Tensor`` merges one tensor: `base` a tensor or
            None, `models` a list of tensors of its shape, `name` the tensor's name, `dtype` that of the result, `out` a contiguous tensor
            to write into or None. The tensors are CPU or device tensors of a floating dtype and must not be changed.
        base: ``"required"``: deltas are taken from it; ``"optional"``; ``"model"``: a base, if named, is one more model (a soup).
        parameters: what a recipe may set.
        min_models, max_models: how many models besides the base.
        summary, source: one line each, for `pymerge methods`.
        sliced: makes a :class:`pymerge.merge_methods.sliced.Sliced`, which gives the same bytes from slices of tensors that need not be in
            memory as a whole. Without it tensors are merged whole, whatever memory that takes.
        whole_model: ``whole_model(**parameters)`` is None where tensors are merged one by one. Otherwise all tensors must have the same
            value, and are given to one :class:`Sliced`.
        cpu_only: why the method does not give the same bytes on every device, if it does not: merges of files on a device refuse it.
    """

    name: str
    tensor: Callable[..., Tensor]
    base: Literal["required", "optional", "model"]
    parameters: tuple[Parameter, ...] = ()
    min_models: int = 1
    max_models: int = MAX_MODELS
    summary: str = ""
    source: str = ""
    sliced: MakeSliced | None = None
    whole_model: Callable[..., Hashable | None] | None = None
    cpu_only: str = ""


_METHODS: dict[str, Method] = {}


def register_method(name: str, **description) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that adds a per-tensor function to the methods that recipes can name; the keywords are :class:`Method`'s fields.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _METHODS:
            raise ValueError(f"merge method {name!r} is registered already, by {_METHODS[name].tensor.__module__}")
        _METHODS[name] = Method(name=name, tensor=function, **description)
        return function

    return register


def methods() -> tuple[str, ...]:
    """Names of the registered methods, sorted."""
    return tuple(sorted(_METHODS))


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none; the message names the nearest ones.
    """
    if name not in _METHODS:
        import difflib

        near = difflib.get_close_matches(name.replace("-", "_"), _METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"merge method {name!r} does not exist{hint} (there are: {', '.join(methods())})")
    return _METHODS[name]
