"""The operators of :mod:`pymerge.ops` on slices of tensors that need not be in memory as a whole, for the engine that merges files.

A slice is flat: elements `first`, `first` + 1, ... of a tensor in row-major order, `first` a multiple of ALIGNMENT. What depends on all of
a tensor is gathered from its slices, in order, and then given to the merge of each; the results are those of the whole tensor, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference, streamed_selection
from .finite import NonFiniteError, raise_if_not_finite
from .spec import MergeSpec

__all__ = ["ALIGNMENT", "StreamedSelection", "delta_sums", "dots", "lerp", "merge", "vote_balance"]

ALIGNMENT = reference.SUM_BLOCK
"""Slices begin at multiples of it, so that they hold whole blocks of the summation tree."""


def _flat(base: Tensor | None, models: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    return (None if base is None else ops._flat(base)), [ops._flat(x) for x in models]


def merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    spec: MergeSpec,
    out: Tensor,
    *,
    name: str,
    first: int,
    shape: Sequence[int],
    selection: Tensor | None = None,
    factors: Sequence[float] | None = None,
    balance: int | None = None,
    check_finite: bool = True,
) -> None:
    """:func:`pymerge.reference.merge` of a slice into `out`; `shape` is the whole tensor's, for messages.

    Raises:
        NonFiniteError: an input has a NaN or an infinity and `check_finite` is set.
        ValueError: the spec needs a selection, factors or a balance, which a slice does not tell, and they are not given.
    """
    c = spec.convention
    missing = [
        what
        for what, needed, given in (
            ("a selection", spec.sparsify in ("magnitude", "band"), selection),
            ("factors", spec.sparsify != "none" and c.rescale == "norm", factors),
            ("a balance", spec.elect and c.zero_vote == "majority", balance),
        )
        if needed and given is None
    ]
    if missing:
        raise ValueError(f"a slice of {name!r} cannot be merged without {' and '.join(missing)} of the whole")
    backend = ops._backend_for(models[0].device)
    flat_base, flat = _flat(base, models)
    details = {"name": name, "selection": selection, "balance": balance, "factors": factors, "first": first}
    labelled = [("base", base), *((f"model {i}", x) for i, x in enumerate(models))]
    if backend is reference:
        if check_finite:
            raise_if_not_finite(labelled, name, first=first, shape=shape)
        out.copy_(reference.merge(flat_base, flat, spec, dtype=out.dtype, **details))
        return
    target, direct = ops._target(models[0], out.dtype, out, [x for _, x in labelled if x is not None])
    finite = backend.merge(flat_base, flat, spec, target, **details)
    if check_finite and not finite:
        raise_if_not_finite(labelled, name, first=first, shape=shape)
    if not direct:
        out.copy_(reference.round_to(target, out.dtype))


def lerp(a: Tensor, b: Tensor, alpha: float, out: Tensor, *, name: str, first: int, shape: Sequence[int], check_finite: bool) -> None:
    """:func:`pymerge.reference.lerp` of a slice into `out`; errors as :func:`merge` has them, `a` the base."""
    try:
        ops.lerp(a, b, alpha, dtype=out.dtype, out=out, check_finite=check_finite)
    except NonFiniteError:
        raise_if_not_finite([("base", a), ("model 0", b)], name, first=first, shape=shape)


def vote_balance(base, models, spec: MergeSpec, *, name: str, first: int, selection: Tensor | None, factors) -> int:
    """A slice's part of :func:`pymerge.reference.vote_balance`; the parts add up."""
    flat_base, flat = _flat(base, models)
    backend = ops._backend_for(models[0].device)
    return backend.vote_balance(flat_base, flat, spec, name=name, selection=selection, factors=factors, first=first)


def delta_sums(base, models, spec: MergeSpec, sums: Sequence[float], *, name: str, first: int, selection: Tensor | None) -> list[float]:
    """See :func:`pymerge.reference.delta_sums`."""
    flat_base, flat = _flat(base, models)
    return ops._backend_for(models[0].device).delta_sums(flat_base, flat, spec, sums, name=name, selection=selection, first=first)


def dots(a: Tensor, b: Tensor, sums: Sequence[float]) -> list[float]:
    """See :func:`pymerge.reference.dots`; `sums` are those of the slices before."""
    return ops._backend_for(a.device).dots(ops._flat(a), ops._flat(b), sums).tolist()


class StreamedSelection:
    """See :class:`pymerge.reference.StreamedSelection`, for slices on `device`; takes fp8 too."""

    def __init__(self, n: int, counts: Sequence[int], tie_break: str, f64: bool, limit: int, device: torch.device) -> None:
        # The reference keeps everything, which is for tests on the CPU.
        implementation = ops._backend_for(device) if device.type == "cpu" else streamed_selection
        self._impl = implementation.StreamedSelection(n, counts, tie_break, f64, limit)
        self.searched = self._impl.searched
        self.sample_ranges, self.lookups = self._impl.sample_ranges, self._impl.lookups
        self.end_pass, self.rows = self._impl.end_pass, self._impl.rows
        self.guesses, self.strayed = self._impl.guesses, self._impl.strayed

    def sample(self, base: Tensor | None, models: Sequence[Tensor]) -> None:
        self._impl.sample(*_flat(base, models))

    def add(self, base: Tensor | None, models: Sequence[Tensor], first: int) -> None:
        self._impl.add(*_flat(base, models), first)

    def look(self, lookup: int, base: Tensor | None, models: Sequence[Tensor], first: int) -> None:
        self._impl.look(lookup, *_flat(base, models), first)
