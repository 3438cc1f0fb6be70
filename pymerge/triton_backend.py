"""The Triton backend: the functions of :mod:`pymerge.native` on flat, contiguous GPU tensors, with the same results, bit for bit.

``merge_many`` and ``lerp_many`` take any number of tensors in a number of launches that depends on the kinds of dtype alone, and do not
wait for the device. ``prepare_merge`` does the host's part once, for merges that run again on the same memory, in CUDA graphs too.
Under TRITON_INTERPRET=1, which must be set before Triton is first imported, all of it takes CPU tensors instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import KEEP_NONE, compute_dtype
from .spec import MergeSpec, tensor_id
from .streamed_selection import StreamedSelection
from .triton_kernels import combine as combine_kernels
from .triton_kernels import lerp as lerp_kernels
from .triton_kernels import reduce as reduce_kernels
from .triton_kernels.compat import INTERPRETED
from .triton_kernels.launch import CHUNK, Finite, Row, Table, aligned, bits_of, chunks_of, tl_dtype
from .triton_kernels.rank import CUT, FOUND, SETTLED_WORDS
from .triton_kernels.rows import KEY_WORD, LARGER_WORD
from .triton_kernels.threshold import Segment, Selection

__all__ = [
    "INTERPRETED", "MergeJob", "PreparedMerge", "StreamedSelection", "all_finite", "delta_sums", "dots", "lerp", "lerp_many", "merge",
    "merge_many", "prepare_merge", "select", "vote_balance",
]  # fmt: skip


@dataclass(frozen=True)
class MergeJob:
    """One tensor of :func:`merge_many`, or a slice of one; the fields are the arguments of :func:`merge`."""

    base: Tensor | None
    models: Sequence[Tensor]
    out: Tensor
    name: str = ""
    selection: Tensor | None = None
    balance: int | None = None
    factors: Sequence[float] | None = None
    first: int = 0

    @property
    def inputs(self) -> list[Tensor]:
        return [*self.models, *([] if self.base is None else [self.base])]


class _Rows:
    """Rows of a merge's table (triton_kernels/rows.py) and what must be done and kept for them."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.sizes: list[int] = []
        self.first_chunk: list[int] = []
        self.copies: list[tuple[Tensor, Tensor]] = []  # a kernel has one dtype for all models; where they differ, these are widened first
        self._chunks = 0

    def add(
        self, base: Tensor | None, models: Sequence[Tensor], out: Tensor | None, compute: torch.dtype, header: Sequence[int],
        per_model: Iterable[Sequence[int]], first: int = 0,
    ) -> None:  # fmt: skip
        """`header`: the row's words from the tensor id to the flat index of its first element; `per_model`: those after the address.

        With `first` the tensors are the elements of larger ones from that index on.
        """
        models = list(models)
        if len({t.dtype for t in models}) > 1:
            for i, t in enumerate(models):
                if t.dtype != compute:
                    models[i] = torch.empty(t.shape, dtype=compute, device=t.device)
                    self.copies.append((models[i], t))
        n = models[0].numel()
        words = [first + n, *(0 if t is None else _origin(t, first) for t in (base, out)), *header, self._chunks - first // CHUNK]
        for x, rest in zip(models, per_model, strict=True):
            words += [_origin(x, first), *rest]
        dtypes = (
            None if base is None else tl_dtype(base.dtype),
            *(tl_dtype(t.dtype) for t in (models[0], models[0] if out is None else out)),
        )
        self.rows.append(Row((*dtypes, tl_dtype(compute), aligned([base, out, *models])), words, first))
        self.sizes.append(n)
        self.first_chunk.append(self._chunks)
        self._chunks += chunks_of(n)

    def widen(self) -> None:
        for wide, t in self.copies:
            wide.copy_(t)


def _origin(t: Tensor, first: int) -> int:
    """Where the whole tensor would begin of which `t` has the elements from `first` on."""
    return t.data_ptr() - first * t.element_size()


class PreparedMerge:
    """A merge of many tensors on one device, with tables copied and side buffers allocated: see :func:`prepare_merge`."""

    def __init__(self, jobs: Sequence[MergeJob], spec: MergeSpec, *, vote: str | None = None) -> None:
        c = spec.convention
        self._jobs = jobs  # the table has their addresses
        count = len(spec.weights)
        together = c.scope == "model"
        computes = [compute_dtype(job.inputs) for job in jobs]
        if together and torch.float64 in computes:
            # Magnitudes of fp32 and fp64 compare only when both are fp64.
            computes = [torch.float64] * len(jobs)
        ranked = [list(range(len(jobs)))] if together else [[j] for j in range(len(jobs))]
        given = [job.balance for job in jobs if job.balance is not None]
        if given and len(given) < len(jobs):
            raise ValueError("give the balance of every tensor, or of none")
        rescaled = [job.factors for job in jobs if job.factors is not None]
        if rescaled and len(rescaled) < len(jobs):
            raise ValueError("give the factors of every tensor, or of none")
        self._majority = spec.elect and c.zero_vote == "majority" and not given
        sums = 0 if given else len(ranked)
        rescale = "none" if spec.sparsify == "none" else c.rescale
        factors = [1.0 / d if rescale == "density" and d > 0 else 1.0 for d in spec.densities]
        bounds = [round(density * 2**32) for density in spec.densities]
        seed = spec.seed - 2**64 if spec.seed >= 2**63 else spec.seed
        bits = {compute: _scalars(spec, factors, compute) for compute in set(computes)}

        # The largest that are kept, or kept and larger, and for a band the larger ones.
        ends = (KEY_WORD, LARGER_WORD)[: 2 if spec.sparsify == "band" else 1]
        rows, segments = _Rows(), {torch.float32: [], torch.float64: []}
        for number, members in enumerate(ranked):
            n, start = sum(jobs[j].out.numel() for j in members), len(rows.rows)
            pending = spec.sparsify in ("magnitude", "band") and all(jobs[j].selection is None for j in members)
            counts = spec.counts(n) if pending else [[0] * count for _ in ends]
            found = [_segment(range(start, start + len(members)), k, n, computes[members[0]]) for k in counts]
            selection_row = len(segments[computes[members[0]]]) * count
            if any(k for segment in found for k in segment.counts):
                segments[computes[members[0]]].append(found)
            offset = 0
            for j in members:
                job, compute = jobs[j], computes[j]
                size = job.out.numel()
                scale, divisor, weights, factor_bits = bits[compute]
                if job.selection is None:
                    cuts = [(key, max(min(cut - offset, size - 1), -1)) for segment in found for key, cut in segment.answers]
                else:
                    cuts = [(min(key, _largest_key(compute)), cut) for key, cut in job.selection.tolist()]
                larger = cuts[count:] or [(0, 0)] * count
                place = 1 + (j if given else number)
                header = [tensor_id(job.name), place, seed, scale, divisor, selection_row, offset]
                if job.factors is not None:
                    factor_bits = [bits_of(factor, compute) for factor in job.factors]
                per_model = [[w, f, *end, bound, *top] for w, f, end, bound, top in zip(weights, factor_bits, cuts, bounds, larger)]
                rows.add(job.base, job.models, job.out, compute, header, per_model, job.first)
                offset += size
        self._rows = rows
        self.table = Table(rows.rows, jobs[0].out.device, sums=sums, given=given, entries=any(segments.values()))
        self._before = [
            Selection(self.table, found, rows.sizes, rows.first_chunk, compute, c.tie_break == "all", to.value)
            for compute, pairs in segments.items() for to, found in zip(ends, zip(*pairs))
        ]  # fmt: skip
        self._norms = reduce_kernels.Norms(self.table, count, spec.sparsify) if rescale == "norm" and not rescaled else None
        self._choices = {
            "MODELS": count, "SPARSIFY": spec.sparsify, "RESCALED": rescale == "norm" or any(factor != 1.0 for factor in factors),
            "VOTE": vote or (c.vote if spec.elect else "none"), "VOTE_WEIGHTED": c.vote_weighted, "ZERO_VOTE": c.zero_vote,
            "DIVISOR": c.divisor,
        }  # fmt: skip
        self.finite = Finite([self.table])

    def _until_norms(self) -> None:
        self.table.reset()
        self._rows.widen()
        for step in self._before:
            step.run()

    def _until_votes(self) -> None:
        self._until_norms()
        if self._norms is not None:
            self._norms.run()

    def run(self) -> Finite:
        """Merge once more. Only launches: nothing is allocated, and nobody waits for the device.

        Returns what is also in `finite`: false, when it is asked for (which waits), if some delta of the last run is NaN or infinite.
        """
        self._until_votes()
        if self._majority:  # the kernel leaves the balance in the table, where the next one reads it
            combine_kernels.combine(self.table, balance_only=True, **self._choices)
        combine_kernels.combine(self.table, **self._choices)
        return self.finite

    def balance(self) -> int:
        """The balance of the votes of all tensors together, and no merge."""
        self._until_votes()
        combine_kernels.combine(self.table, balance_only=True, **self._choices)
        return int(self.table.words[1 : 1 + len(self._jobs)].sum())

    def delta_sums(self, before: Sequence[float]) -> list[float]:
        """Of one job, whose spec restores norms: what these are made of, on top of `before`, and no merge."""
        self._until_norms()
        return self._norms.of_one(self._jobs[0].out.numel(), before)


def _largest_key(compute: torch.dtype) -> int:
    return torch.iinfo(torch.int64 if compute == torch.float64 else torch.int32).max


def _scalars(spec: MergeSpec, factors: Sequence[float], compute: torch.dtype) -> tuple[int, int, list[int], list[int]]:
    """Bits of the scale, of the sum of the weights (1 when that is 0), of weights and of factors."""
    total = torch.zeros((), dtype=compute)
    for weight in spec.weights:
        total = total + torch.tensor(weight, dtype=torch.float64).to(compute)
    weights = [bits_of(weight, compute) for weight in spec.weights]
    return bits_of(spec.scale, compute), bits_of(float(total) or 1.0, compute), weights, [bits_of(factor, compute) for factor in factors]


def _segment(tensors: Iterable[int], counts: Sequence[int], n: int, compute: torch.dtype) -> Segment:
    """Counts of 0 for what needs no look at the data, and the answers there."""
    answers = [(min(KEEP_NONE[0], _largest_key(compute)), -1) if k <= 0 or n == 0 else (0, n - 1) for k in counts]
    return Segment(list(tensors), [k if 0 < k < n else 0 for k in counts], answers)


def prepare_merge(jobs: Sequence[MergeJob], spec: MergeSpec) -> PreparedMerge:
    """A merge to run many times on the same memory: ``merge = prepare_merge(jobs, spec); merge.run()``.

    Args:
        jobs: at least one tensor, all flat, contiguous and on one device; their memory is read and written by every run. With a
            convention of scope "model" ranks and tied elections are taken over all of them in their order.
        spec: what to compute.
    """
    if not jobs:
        raise ValueError("no tensors given")
    return PreparedMerge(jobs, spec)


def merge_many(jobs: Sequence[MergeJob], spec: MergeSpec) -> Finite:
    """:func:`merge` of many tensors on one device in a constant number of launches, without waiting for the device."""
    return PreparedMerge(jobs, spec).run() if jobs else Finite([])


def merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    spec: MergeSpec,
    out: Tensor,
    *,
    name: str = "",
    selection: Tensor | None = None,
    balance: int | None = None,
    factors: Sequence[float] | None = None,
    first: int = 0,
) -> Finite:
    """:func:`pymerge.reference.merge` into `out`; what it returns is false when some delta is NaN or infinite. `first` is a multiple of
    4096."""
    return merge_many([MergeJob(base, models, out, name, selection, balance, factors, first)], spec)


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
    """See :func:`pymerge.reference.vote_balance`."""
    job = MergeJob(base, models, models[0], name, selection, None, factors, first)  # nothing is written
    return PreparedMerge([job], spec, vote=spec.convention.vote).balance()


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
    """See :func:`pymerge.reference.delta_sums`; for a spec that restores norms."""
    return PreparedMerge([MergeJob(base, models, models[0], name, selection, first=first)], spec).delta_sums(sums)


def select(bases: Sequence[Tensor] | None, models: Sequence[Sequence[Tensor]], counts: Sequence[int], tie_break: str = "first") -> Tensor:
    """See :func:`pymerge.reference.select`."""
    sizes = [t.numel() for t in models[0]] if models else []
    n = sum(sizes)
    result = torch.tensor([KEEP_NONE if k <= 0 or n == 0 else (0, n - 1) for k in counts], dtype=torch.int64).reshape(len(counts), 2)
    compute = compute_dtype([*(bases or ()), *(t for model in models for t in model)])
    segment = _segment(range(len(sizes)), counts, n, compute)
    if not any(segment.counts):
        return result
    rows, offset = _Rows(), 0
    for j, size in enumerate(sizes):
        header = [0, 0, 0, 0, 0, 0, offset]
        rows.add(bases[j] if bases else None, [model[j] for model in models], None, compute, header, [[0] * 7] * len(models))
        offset += size
    rows.widen()
    table = Table(rows.rows, models[0][0].device, entries=True)
    selection = Selection(table, [segment], rows.sizes, rows.first_chunk, compute, tie_break == "all")
    selection.run()
    found = selection.settled.view(-1, SETTLED_WORDS.value)[:, [FOUND.value, CUT.value]].cpu()
    looked_at = torch.tensor(segment.counts) > 0
    result[looked_at] = found[looked_at]
    return result


def lerp_many(pairs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float) -> Finite:
    """:func:`lerp` of many (a, b, out) on one device, a launch per kind of dtype."""
    rows = []
    near_a = alpha < 0.5
    weights = {compute: bits_of(alpha if near_a else 1.0 - alpha, compute) for compute in (torch.float32, torch.float64)}
    for a, b, out in pairs:
        compute = compute_dtype([a, b])
        group = (tl_dtype(a.dtype), tl_dtype(b.dtype), tl_dtype(out.dtype), tl_dtype(compute), aligned([a, b, out]))
        rows.append(Row(group, [a.numel(), a.data_ptr(), b.data_ptr(), out.data_ptr(), weights[compute]]))
    if not rows:
        return Finite([])
    table = Table(rows, pairs[0][0].device)
    lerp_kernels.lerp(table, near_a)
    return Finite([table])


def lerp(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> Finite:
    """:func:`pymerge.reference.lerp` into `out`, which may be `a`; what it returns is false when some b - a is NaN or infinite."""
    return lerp_many([(a, b, out)], alpha)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of any of the tensors is NaN or infinite, by one launch per kind of dtype; waits for the device."""
    rows = [Row((tl_dtype(t.dtype), aligned([t])), [t.numel(), t.data_ptr()]) for t in tensors]
    if not rows:
        return True
    table = Table(rows, tensors[0].device)
    lerp_kernels.look_for_infinities(table)
    return bool(Finite([table]))


def dots(a: Tensor, b: Tensor, sums: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """See :func:`pymerge.reference.dots`."""
    return reduce_kernels.dots(a, b, sums)
