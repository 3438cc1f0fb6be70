"""The oracle: every operation of the merge core in plain, slow, readable torch.

This module defines the arithmetic; the C++ and Triton backends return the same bytes. The rules (docs/arithmetic.md):

* load in the storage dtype, widen, compute in fp32 (in fp64 when any input is fp64), one IEEE operation at a time, no fused multiply-add;
* scalars are rounded to the compute dtype once; models are added in list order, starting from +0;
* round once to nearest even at the store; subnormals are kept;
* whole-tensor sums follow one fixed tree in fp64 that depends on element indices alone.

Shapes do not matter here: every function sees flat, contiguous tensors. They may be a slice of a larger tensor, of which they are the
elements from `first` on: then what depends on all of it (the selection, the rescaling factors, the balance of the votes) has to be given.
Checking the input is the caller's business (`ops`, `tree`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spec import MergeSpec, tensor_id

__all__ = [
    "StreamedSelection", "abs_sums", "compute_dtype", "delta_sums", "dots", "draws", "kept_by_magnitude", "lerp", "merge", "round_to",
    "select", "vote_balance",
]  # fmt: skip


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """fp64 when any tensor is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, rounded once to nearest even.

    torch rounds fp64 to a half type by way of fp32, which rounds twice. Rounding to odd on the way there makes the second rounding exact
    (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    if x.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    single = x.to(torch.float32)
    bits = single.view(torch.int32)
    bits = torch.where(single.double().abs() > x.abs(), bits - 1, bits)  # truncate toward zero
    inexact = (single.double() != x) & ~torch.isnan(x)
    bits = torch.where(inexact, bits | 1, bits)
    return bits.view(torch.float32).to(dtype)


def _deltas(base: Tensor | None, models: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    b = torch.zeros((), dtype=dtype, device=models[0].device) if base is None else base.to(dtype)
    return [x.to(dtype) - b for x in models]


def _keys(delta: Tensor) -> Tensor:
    """Magnitudes as integers in the same order: the bits of |delta|."""
    if delta.dtype == torch.float64:
        return delta.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return delta.view(torch.int32).to(torch.int64) & 0x7FFFFFFF


# --------------------------------------------------------------------------------------------------------------------------------------
# Selection by magnitude

KEEP_NONE = (2**63 - 1, -1)


def select(bases: Sequence[Tensor] | None, models: Sequence[Sequence[Tensor]], counts: Sequence[int], tie_break: str = "first") -> Tensor:
    """For each model, which deltas are among its `counts[i]` largest by magnitude.

    Args:
        bases: the base's tensors, or None for a base of zeros.
        models: per model, its tensors in the same order; ranks run over all of them together, flat indices too.
        counts: how many elements to keep, per model.
        tie_break: ``"first"`` or ``"all"``, as in :class:`pymerge.Convention`.

    Returns:
        int64 ``[len(models), 2]``: (key, cut) per model. With ``key_e`` the bits of ``|delta_e|`` as an integer, element e is kept iff
        ``key_e > key`` or (``key_e == key`` and ``e <= cut``). Keep none is (2**63 - 1, -1), keep all is (0, n - 1).
    """
    flat = [t for model in models for t in model] + list(bases or ())
    dtype = compute_dtype(flat)
    rows = []
    for model, k in zip(models, counts, strict=True):
        pieces = [_keys(_deltas(bases[j] if bases else None, [t], dtype)[0].reshape(-1)) for j, t in enumerate(model)]
        rows.append(_select_keys(torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64), k, tie_break))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(models), 2)


def _select_keys(keys: Tensor, k: int, tie_break: str) -> tuple[int, int]:
    n = keys.numel()
    if k <= 0 or n == 0:
        return KEEP_NONE
    if k >= n:
        return 0, n - 1
    key = int(torch.sort(keys, descending=True).values[k - 1])
    equal = torch.nonzero(keys == key).reshape(-1)
    above = int((keys > key).sum())
    return key, n - 1 if tie_break == "all" else int(equal[k - above - 1])


class StreamedSelection:
    """:func:`select` for tensors that pass by in parts, in any order. Here the keys of all are kept; the C++ core keeps few.

    :meth:`sample` is to be called with the elements of :meth:`sample_ranges`; then :meth:`add` with all elements, pass after pass, until
    :meth:`end_pass` says that it was the last one; then :meth:`look` with the elements of each of :meth:`lookups`; then :meth:`rows`.

    Args:
        n: elements in all.
        counts, tie_break: as in :func:`select`.
        f64: compute in fp64.
        limit: keys per model to keep in memory, at most.
    """

    def __init__(self, n: int, counts: Sequence[int], tie_break: str, f64: bool, limit: int) -> None:
        self._counts, self._tie_break = counts, tie_break
        self._dtype = torch.float64 if f64 else torch.float32
        self._keys = torch.full((len(counts), n), -1, dtype=torch.int64)

    @property
    def searched(self) -> int:
        """Models whose threshold is not known from the counts alone; without any, nothing has to be added."""
        return sum(0 < k < self._keys.shape[1] for k in self._counts)

    def sample_ranges(self) -> list[tuple[int, int]]:
        """Flat indices [begin, end) of what :meth:`sample` wants to see before the first pass, ascending."""
        return []

    def sample(self, base: Tensor | None, models: Sequence[Tensor]) -> None:
        """Elements of some of the ranges."""

    def add(self, base: Tensor | None, models: Sequence[Tensor], first: int) -> None:
        """The elements from flat index `first` on."""
        for row, delta in zip(self._keys, _deltas(base, models, self._dtype), strict=True):
            row[first : first + len(delta)] = _keys(delta)

    def guesses(self) -> Tensor:
        """Once the sample was given: what :meth:`rows` is likely to be, ties all kept. Here no more is known than that all may be kept."""
        return torch.tensor([(0, self._keys.shape[1] - 1)] * len(self._counts), dtype=torch.int64).reshape(-1, 2)

    def strayed(self) -> list[int]:
        """In the end, per model: how many elements the guess and the result (with all ties) do not have in common, at most."""
        return [self._keys.shape[1]] * len(self._counts)

    def end_pass(self) -> bool:
        """Whether the thresholds are known now; if not, everything has to be added again.

        Raises:
            ValueError: not all elements were added.
        """
        if self.searched and bool((self._keys < 0).any()):
            raise ValueError(f"a selection over {self._keys.shape[1]} elements was not given all of them")
        return True

    def lookups(self) -> list[tuple[int, int]]:
        """Flat indices [begin, end) of what has to be looked at again to find the cuts."""
        return []

    def look(self, lookup: int, base: Tensor | None, models: Sequence[Tensor], first: int) -> None:
        """Elements from flat index `first` on that contain the range ``lookups()[lookup]``."""

    def rows(self) -> Tensor:
        """What :func:`select` returns."""
        rows = [_select_keys(keys, k, self._tie_break) for keys, k in zip(self._keys, self._counts, strict=True)]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def kept_by_magnitude(delta: Tensor, key: int, cut: int, first: int = 0) -> Tensor:
    """Which elements of a flat delta, which begins at element `first`, a row of :func:`select` keeps."""
    keys = _keys(delta)
    index = first + torch.arange(keys.numel(), device=keys.device)
    return (keys > key) | ((keys == key) & (index <= cut))


# --------------------------------------------------------------------------------------------------------------------------------------
# Random drops

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def _philox_round(c: list[Tensor], k0: int, k1: int) -> list[Tensor]:
    # 32x32 -> 64 bit products wrap in int64; the bits are right all the same, and the mask after the shift removes the sign extension.
    p0, p1 = c[0] * _PHILOX_M[0], c[2] * _PHILOX_M[1]
    low = 0xFFFFFFFF
    return [((p1 >> 32) & low) ^ c[1] ^ k0, p1 & low, ((p0 >> 32) & low) ^ c[3] ^ k1, p0 & low]


def philox_words(counter: list[Tensor], seed: int) -> list[Tensor]:
    """The four output words of Philox4x32-10 (Salmon et al. 2011) for four counter words, all as int64, and a 64-bit key."""
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        counter = _philox_round(counter, k0, k1)
        k0, k1 = (k0 + _PHILOX_W[0]) & 0xFFFFFFFF, (k1 + _PHILOX_W[1]) & 0xFFFFFFFF
    return counter


def draws(begin: int, end: int, tensor: int, model: int, seed: int, device: torch.device) -> Tensor:
    """The draws of elements begin, ..., end - 1, uniform in [0, 2**32), as int64.

    key = seed; counter = (index >> 2 as two words, tensor id, model index); the draw is word index & 3 of the output.
    """
    group = torch.arange(begin >> 2, (end + 3) >> 2, device=device)
    counter = [group & 0xFFFFFFFF, group >> 32, torch.full_like(group, tensor), torch.full_like(group, model)]
    words = torch.stack(philox_words(counter, seed), dim=1).reshape(-1)
    return words[begin & 3 :][: end - begin]


# --------------------------------------------------------------------------------------------------------------------------------------
# Whole-tensor sums

SUM_BLOCK, SUM_LANES = 4096, 64


def tree_sum(values: Tensor, total: float = 0.0) -> float:
    """Sum of fp64 `values` in the one order that every backend uses.

    Blocks of 4096; in a block, 64 lanes by index mod 64, each added in order from +0; the lanes folded in halves (lane j += lane j + 32,
    then 16, ...); block sums added in order to `total`, the sum of whole blocks before these.
    """
    padded = torch.zeros(-(-values.numel() // SUM_BLOCK) * SUM_BLOCK, dtype=torch.float64, device=values.device)
    padded[: values.numel()] = values
    rows = padded.reshape(-1, SUM_BLOCK // SUM_LANES, SUM_LANES)
    lanes = torch.zeros_like(rows[:, 0])
    for row in rows.unbind(1):
        lanes = lanes + row
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    for block in lanes.reshape(-1).tolist():
        total += block
    return total


def dots(a: Tensor, b: Tensor, sums: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """fp64 ``[3]``: a·a, b·b and a·b, each product in fp64, summed by :func:`tree_sum`, on top of `sums` of the slices before."""
    x, y = a.reshape(-1).double(), b.reshape(-1).double()
    return torch.tensor([tree_sum(p, s) for p, s in zip((x * x, y * y, x * y), sums, strict=True)], dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------------------------------
# The fused merge


def _kept(deltas: Sequence[Tensor], spec: MergeSpec, name: str, selection: Tensor | None, first: int) -> list[Tensor]:
    """Which elements of each delta survive sparsification."""
    n = deltas[0].numel()
    if spec.sparsify == "bernoulli":
        ident = tensor_id(name)
        bounds = [round(density * 2**32) for density in spec.densities]
        return [draws(first, first + n, ident, i, spec.seed, deltas[0].device) < bound for i, bound in enumerate(bounds)]
    if spec.sparsify in ("magnitude", "band"):
        if selection is None:
            rows = [[d] for d in deltas]
            selection = torch.cat([select(None, rows, counts, spec.convention.tie_break) for counts in spec.counts(n)])
        chosen = [kept_by_magnitude(deltas[i % len(deltas)], key, cut, first) for i, (key, cut) in enumerate(selection.tolist())]
        kept, larger = chosen[: len(deltas)], chosen[len(deltas) :]
        return [inside & ~above for inside, above in zip(kept, larger, strict=True)] if larger else kept
    return [torch.ones_like(d, dtype=torch.bool) for d in deltas]


def abs_sums(delta: Tensor, kept: Tensor, sums: Sequence[float] = (0.0, 0.0)) -> tuple[float, float]:
    """L1 norms, by :func:`tree_sum`, of a delta and of its kept part, on top of `sums` of the slices before."""
    magnitude = delta.double().abs()
    return tree_sum(magnitude, sums[0]), tree_sum(torch.where(kept, magnitude, torch.zeros_like(magnitude)), sums[1])


def delta_sums(
    base: Tensor | None,
    models: Sequence[Tensor],
    spec: MergeSpec,
    sums: Sequence[float],
    *,
    name: str = "",
    selection: Tensor | None = None,
    first: int = 0,
) -> list[float]:
    """:func:`abs_sums` of each model in turn, on top of `sums`, which has two numbers per model too. A slice ends with its tensor, or has
    whole blocks of 4096."""
    dtype = compute_dtype([*models, *([] if base is None else [base])])
    deltas = _deltas(base, models, dtype)
    kept = _kept(deltas, spec, name, selection, first)
    return [s for i, (d, m) in enumerate(zip(deltas, kept, strict=True)) for s in abs_sums(d, m, sums[2 * i : 2 * i + 2])]


def _rescale_factor(delta: Tensor, kept: Tensor, density: float, rescale: str) -> float:
    if rescale == "density":
        return 1.0 / density if density > 0 else 1.0
    if rescale == "norm":
        full, part = abs_sums(delta, kept)
        return full / part if part > 0 else 1.0
    return 1.0


def _trimmed_and_weighted(base, models, spec: MergeSpec, name: str, selection: Tensor | None, factors: Sequence[float] | None, first: int):
    """Per model: which elements are kept, the rescaled delta (zero where dropped), and that times the model's weight."""
    dtype = compute_dtype([*models, *([] if base is None else [base])])
    deltas = _deltas(base, models, dtype)
    kept = _kept(deltas, spec, name, selection, first)
    rescale = "none" if spec.sparsify == "none" else spec.convention.rescale
    trimmed, weighted = [], []
    for i, (d, m) in enumerate(zip(deltas, kept, strict=True)):
        factor = _rescale_factor(d, m, spec.densities[i], rescale) if factors is None else factors[i]
        t = torch.where(m, d * _scalar(factor, d), torch.zeros_like(d))
        trimmed.append(t)
        weighted.append(t * _scalar(spec.weights[i], d))
    return kept, trimmed, weighted


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=like.device).to(like.dtype)


def _votes(trimmed, weighted, spec: MergeSpec) -> tuple[list[Tensor], Tensor]:
    """What each model votes with, and the sum of the vote per element."""
    votes = weighted if spec.convention.vote_weighted else trimmed
    total = torch.zeros_like(votes[0])
    for v in votes:
        total = total + (v if spec.convention.vote == "mass" else (v > 0).to(v.dtype) - (v < 0).to(v.dtype))
    return votes, total


def vote_balance(
    base: Tensor | None,
    models: Sequence[Tensor],
    spec: MergeSpec,
    *,
    name: str = "",
    selection: Tensor | None = None,
    factors: Sequence[float] | None = None,
    first: int = 0,
) -> int:
    """Sum over the elements of the sign of the vote: positive when most elections are won by the positive side."""
    _, trimmed, weighted = _trimmed_and_weighted(base, models, spec, name, selection, factors, first)
    total = _votes(trimmed, weighted, spec)[1]
    return int((total > 0).sum()) - int((total < 0).sum())


def _zero_sign(spec: MergeSpec, balance: int) -> int:
    """Whom a tied election elects: +1, -1, or 0 for nobody."""
    rule = spec.convention.zero_vote
    if rule == "majority":
        return 1 if balance > 0 else -1
    return 1 if rule == "positive" else 0


def merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    spec: MergeSpec,
    *,
    name: str = "",
    selection: Tensor | None = None,
    balance: int | None = None,
    factors: Sequence[float] | None = None,
    first: int = 0,
    dtype: torch.dtype,
) -> Tensor:
    """The fused sparsify-elect-combine operation on one tensor.

    Args:
        base: flat tensor [n], or None for a base of zeros.
        models: flat tensors [n].
        spec: what to compute.
        name: the tensor's name; decides the Bernoulli draws.
        selection: result of :func:`select` with cuts that count from this tensor's first element, when the ranks are not this tensor's;
            for a band the rows of the models' upper ends, which are left out, follow.
        balance: result of :func:`vote_balance` over the whole scope, when that is not this tensor.
        factors: what each model's kept deltas are multiplied with, when that does not follow from these elements.
        first: index in the tensor of the first element given here, when they are a slice of it.
        dtype: of the result.
    """
    kept, trimmed, weighted = _trimmed_and_weighted(base, models, spec, name, selection, factors, first)
    zero = torch.zeros_like(trimmed[0])
    weights = [_scalar(w, zero) for w in spec.weights]
    if spec.elect:
        votes, total = _votes(trimmed, weighted, spec)
        if spec.convention.zero_vote == "majority" and balance is None:
            balance = int((total > 0).sum()) - int((total < 0).sum())
        tied = _zero_sign(spec, balance or 0)
        sign = torch.where(total > 0, 1, torch.where(total < 0, -1, tied))
        chosen = [((v > 0) & (sign > 0)) | ((v < 0) & (sign < 0)) for v in votes]
        counted = chosen
    else:
        chosen = kept
        counted = [torch.ones_like(kept[0])] * len(models) if spec.convention.divisor == "weights" else kept
    merged, weight, count = zero, zero, zero
    for p, w, c, h in zip(weighted, weights, counted, chosen, strict=True):
        merged = merged + torch.where(h, p, zero)
        weight = weight + torch.where(c, w, zero)
        count = count + c.to(zero.dtype)
    if spec.convention.divisor == "weights":
        merged = merged / torch.where(weight == 0, torch.ones_like(weight), weight)
    elif spec.convention.divisor == "count":
        merged = merged / count.clamp(min=1)
    merged = merged * _scalar(spec.scale, zero)
    return round_to((zero if base is None else base.to(zero.dtype)) + merged, dtype)


def lerp(a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """Linear interpolation from a (alpha = 0) to b (alpha = 1), exact at both ends and where a == b.

    ``a + alpha * (b - a)`` for alpha < 0.5, else ``b - (1 - alpha) * (b - a)``.
    """
    compute = compute_dtype([a, b])
    x, y = a.to(compute), b.to(compute)
    if alpha < 0.5:
        return round_to(x + (y - x) * _scalar(alpha, x), dtype)
    return round_to(y - (y - x) * _scalar(1.0 - alpha, x), dtype)
