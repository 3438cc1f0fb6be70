"""The Triton backend: the functions of :mod:`pymerge.native` on flat, contiguous GPU tensors, with the same results, bit for bit.

``merge_many`` and ``lerp_many`` take any number of tensors in as many launches as there are kinds of dtype. Under TRITON_INTERPRET=1, which
must be set before Triton is first imported, all of it takes CPU tensors instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import compute_dtype
from .spec import MergeSpec, tensor_id
from .triton_kernels import combine as combine_kernels
from .triton_kernels import lerp as lerp_kernels
from .triton_kernels import reduce as reduce_kernels
from .triton_kernels.compat import INTERPRETED
from .triton_kernels.launch import Finite, Row, Table, aligned, bits_of, tl_dtype
from .triton_kernels.threshold import Selector

__all__ = ["INTERPRETED", "MergeJob", "dots", "lerp", "lerp_many", "merge", "merge_many", "select", "vote_balance"]


def _same_dtype(tensors: Sequence[Tensor], compute: torch.dtype) -> list[Tensor]:
    """A kernel has one dtype for all models. Where they differ they are widened first, which is exact and rare."""
    return list(tensors) if len({t.dtype for t in tensors}) == 1 else [t.to(compute) for t in tensors]


@dataclass(frozen=True)
class MergeJob:
    """One tensor of :func:`merge_many`; the fields are the arguments of :func:`merge`."""

    base: Tensor | None
    models: Sequence[Tensor]
    out: Tensor
    name: str = ""
    selection: Tensor | None = None
    balance: int | None = None


def _row(job: MergeJob, spec: MergeSpec, factors: Sequence[float], selection: Sequence[tuple[int, int]]) -> tuple[Row, list[Tensor]]:
    """A row of combine.py's table, and the tensors that must live until the launch."""
    given = [*job.models, *([] if job.base is None else [job.base])]
    compute = compute_dtype(given)
    models = _same_dtype(job.models, compute)
    largest_key = torch.iinfo(torch.int64 if compute == torch.float64 else torch.int32).max
    total = torch.zeros((), dtype=compute)
    for weight in spec.weights:
        total = total + torch.tensor(weight, dtype=torch.float64).to(compute)
    words = [
        job.out.numel(), 0 if job.base is None else job.base.data_ptr(), job.out.data_ptr(), tensor_id(job.name), job.balance or 0,
        spec.seed - 2**64 if spec.seed >= 2**63 else spec.seed, bits_of(spec.scale, compute), bits_of(float(total) or 1.0, compute),
    ]  # fmt: skip
    ends = [(min(key, largest_key), cut) for key, cut in selection]
    larger = ends[len(models) :] or [(0, 0)] * len(models)
    rows = zip(models, spec.weights, factors, ends[: len(models)], spec.densities, larger, strict=True)
    for x, weight, factor, end, density, left_out in rows:
        words += [x.data_ptr(), bits_of(weight, compute), bits_of(factor, compute), *end, round(density * 2**32), *left_out]
    dtypes = (None if job.base is None else tl_dtype(job.base.dtype), *(tl_dtype(t.dtype) for t in (models[0], job.out)))
    return Row((*dtypes, tl_dtype(compute), aligned([job.base, job.out, *models])), words), models


def _selection(job: MergeJob, spec: MergeSpec) -> list[tuple[int, int]]:
    if spec.sparsify not in ("magnitude", "band"):
        return [(0, 0)] * len(job.models)
    selection = job.selection
    if selection is None:
        base, rows = None if job.base is None else [job.base], [[x] for x in job.models]
        selection = torch.cat([select(base, rows, counts, spec.convention.tie_break) for counts in spec.counts(job.out.numel())])
    return [tuple(row) for row in selection.tolist()]


def _factors(job: MergeJob, spec: MergeSpec, selection: Sequence[tuple[int, int]]) -> list[float]:
    count = len(job.models)
    rescale = "none" if spec.sparsify == "none" else spec.convention.rescale
    if rescale == "density":
        return [1.0 / density if density > 0 else 1.0 for density in spec.densities]
    if rescale == "none" or job.out.numel() == 0:
        return [1.0] * count
    row, kept_alive = _row(job, spec, [1.0] * count, selection)
    base, model, _, compute, _ = row.group
    words = torch.tensor(row.words, dtype=torch.int64).to(job.out.device)
    sums = reduce_kernels.abs_sums(words, job.out.numel(), count, base, model, compute, spec.sparsify)
    del kept_alive
    return [full / part if part > 0 else 1.0 for full, part in sums]


def _table(jobs: Sequence[MergeJob], spec: MergeSpec) -> tuple[Table, dict, list]:
    rows, kept_alive, rescaled = [], [], False
    for job in jobs:
        selection = _selection(job, spec)
        factors = _factors(job, spec, selection)
        row, tensors = _row(job, spec, factors, selection)
        rescaled |= any(factor != 1.0 for factor in factors)
        rows.append(row)
        kept_alive += tensors
    c = spec.convention
    choices = {
        "MODELS": len(spec.weights),
        "SPARSIFY": spec.sparsify,
        "RESCALED": rescaled,
        "VOTE": c.vote if spec.elect else "none",
        "VOTE_WEIGHTED": c.vote_weighted,
        "ZERO_VOTE": c.zero_vote,
        "DIVISOR": c.divisor,
    }
    return Table(rows, jobs[0].out.device), choices, kept_alive


def merge_many(jobs: Sequence[MergeJob], spec: MergeSpec) -> Finite:
    """:func:`merge` of many tensors on one device in a constant number of launches, plus what selections and norms take per tensor."""
    if not jobs:
        return Finite([])
    table, choices, kept_alive = _table(jobs, spec)
    if spec.elect and spec.convention.zero_vote == "majority":
        given = [job for job in jobs if job.balance is not None]
        if given and len(given) < len(jobs):
            raise ValueError("give the balance of every tensor, or of none")
        if not given:  # the kernel leaves it in the table, where the next one reads it
            combine_kernels.combine(table, balance_only=True, **choices)
    combine_kernels.combine(table, **choices)
    del kept_alive
    return Finite([table])


def merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    spec: MergeSpec,
    out: Tensor,
    *,
    name: str = "",
    selection: Tensor | None = None,
    balance: int | None = None,
) -> Finite:
    """:func:`pymerge.reference.merge` into `out`; what it returns is false when some delta is NaN or infinite."""
    return merge_many([MergeJob(base, models, out, name, selection, balance)], spec)


def vote_balance(base: Tensor | None, models: Sequence[Tensor], spec: MergeSpec, *, name: str = "", selection: Tensor | None = None) -> int:
    """See :func:`pymerge.reference.vote_balance`."""
    job = MergeJob(base, models, models[0], name, selection)  # nothing is written
    table, choices, kept_alive = _table([job], spec)
    combine_kernels.combine(table, balance_only=True, **{**choices, "VOTE": spec.convention.vote})
    balance = int(table.words[table.row_at[0] + combine_kernels.BALANCE_WORD.value])
    del kept_alive
    return balance


def select(bases: Sequence[Tensor] | None, models: Sequence[Sequence[Tensor]], counts: Sequence[int], tie_break: str = "first") -> Tensor:
    """See :func:`pymerge.reference.select`."""
    if not models or not models[0]:
        return torch.tensor([(2**63 - 1, -1)] * len(counts), dtype=torch.int64).reshape(len(counts), 2)
    compute = compute_dtype([*(bases or ()), *(t for model in models for t in model)])
    columns = [_same_dtype([model[j] for model in models], compute) for j in range(len(models[0]))]
    selector = Selector(bases, [[column[i] for column in columns] for i in range(len(models))], compute)
    return torch.tensor(selector.run(counts, tie_break == "all"), dtype=torch.int64).reshape(len(counts), 2)


def lerp_many(pairs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float) -> Finite:
    """:func:`lerp` of many (a, b, out) on one device, a launch per kind of dtype."""
    rows = []
    near_a = alpha < 0.5
    for a, b, out in pairs:
        compute = compute_dtype([a, b])
        weight = bits_of(alpha if near_a else 1.0 - alpha, compute)
        group = (tl_dtype(a.dtype), tl_dtype(b.dtype), tl_dtype(out.dtype), tl_dtype(compute), aligned([a, b, out]))
        rows.append(Row(group, [a.numel(), a.data_ptr(), b.data_ptr(), out.data_ptr(), weight]))
    if not rows:
        return Finite([])
    table = Table(rows, pairs[0][0].device)
    lerp_kernels.lerp(table, near_a)
    return Finite([table])


def lerp(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> Finite:
    """:func:`pymerge.reference.lerp` into `out`, which may be `a`; what it returns is false when some b - a is NaN or infinite."""
    return lerp_many([(a, b, out)], alpha)


def dots(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`pymerge.reference.dots`."""
    return reduce_kernels.dots(a, b)
