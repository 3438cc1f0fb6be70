"""Operators on many tensors at once: ``torch.ops.pymerge.merge_many_out``, ``lerp_many_out`` and ``lerp_many_``.

On a GPU the number of launches does not depend on the number of tensors, and nobody waits for the device unless `check_finite` asks, once
at the end. The C++ core gets lists too, and puts a thread to each small tensor. The reference merges tensors one after the other. Tensors
may be on several devices; autograd does not pass through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import fresh, ops
from .finite import raise_if_not_finite
from .spec import MergeSpec

if TYPE_CHECKING:
    from .triton_kernels.launch import Finite

__all__ = ["Job", "group_bytes", "in_one_go", "launch_lerps", "launch_merges", "lerp_many", "lerp_many_", "merge_many", "require_finite"]

T = TypeVar("T")


GROUP_BYTES = 64 << 20  # of inputs, in CPU memory: thousands of small tensors, and not much beside a model


class Job(NamedTuple):
    """One tensor to merge: its name, base's and models' tensors, the result's dtype, and where to write it if that is given."""

    name: str
    base: Tensor | None
    models: Sequence[Tensor]
    dtype: torch.dtype
    out: Tensor | None = None

    def target(self) -> Tensor:
        if self.out is not None:
            return self.out
        like = self.models[0]
        if like.dtype is self.dtype and type(like) in ops.PLAIN and like.is_contiguous():
            return fresh.in_large_pages(torch.empty_like(like))  # the same in a third of the time
        return fresh.empty(like.shape, self.dtype, like.device)


def in_one_go(device: torch.device) -> bool:
    """Whether all tensors on `device` are better given at once, however many they are: in a constant number of launches."""
    return ops.backend_name(device) == "triton"


def group_bytes(device: torch.device) -> float:
    """How many bytes of inputs on `device` are better given at once than one by one, so that not all of them need be in memory."""
    if in_one_go(device):
        return math.inf
    # Under torch.compile each tensor is an operator of its own, whose result the compiler may place.
    return GROUP_BYTES if ops.backend_name(device) == "native" and not torch.compiler.is_compiling() else 0


def merge_many(jobs: Sequence[Job], spec: MergeSpec, *, check_finite: bool = True) -> list[Tensor]:
    """The fused merge of many tensors, see :func:`pymerge.ops.merge`, whose errors it has; results in the jobs' order.

    With a convention of scope "model" ranks and tied elections are taken over all of them, in the order of their names.
    """
    if len(jobs) == 1:
        (job,) = jobs
        return [ops.merge(job.base, job.models, spec, name=job.name, dtype=job.dtype, out=job.out, check_finite=check_finite)]
    placed = [job if job.out is not None else Job(job.name, job.base, job.models, job.dtype, job.target()) for job in jobs]
    outs, arranged = [job.out for job in placed], _arranged(placed, spec)
    bases = [job.base for job in arranged if job.base is not None]
    models = [x for job in arranged for x in job.models]
    if ops.unwatched([*bases, *models, *outs]):
        _merge_all(arranged, spec, check_finite)
        return outs
    torch.ops.pymerge.merge_many_out(
        bases, models, *ops._spec_args(None, (), spec, "", None)[2:-2], spec.convention.scope, [job.name for job in arranged], check_finite,
        [job.out for job in arranged],
    )  # fmt: skip
    return outs


def _arranged(jobs: Sequence[Job], spec: MergeSpec) -> Sequence[Job]:
    """In the order of ranks: by name, as in the TIES authors' code, which flattens sorted state dicts."""
    return sorted(jobs, key=lambda job: job.name) if spec.convention.scope == "model" else jobs


def launch_merges(jobs: Sequence[Job], spec: MergeSpec) -> Finite | bool:
    """:func:`merge_many` of tensors on one device into their `out`, without waiting for it and without looking for NaN.

    Returns what is false, when it is asked (which waits), if some delta may be NaN or infinite.
    """
    device = jobs[0].models[0].device
    jobs = _arranged(jobs, spec)
    if in_one_go(device):
        return _merge_in_one_go(jobs, spec, device)
    return not _merge_here(jobs, spec, check_finite=False)


def launch_lerps(jobs: Sequence[Job], alpha: float) -> Finite | bool:
    """:func:`lerp_many`, as :func:`launch_merges` does it."""
    device = jobs[0].base.device
    if in_one_go(device):
        return _lerp_in_one_go(jobs, alpha, device)
    return not _lerp_here(jobs, alpha, ("", ""), check_finite=False)


def lerp_many(jobs: Sequence[Job], alpha: float, *, labels: tuple[str, str], check_finite: bool = True) -> list[Tensor]:
    """Linear interpolation from each job's base to its one model, see :func:`pymerge.ops.lerp`, whose errors it has."""
    if len(jobs) == 1:
        (job,) = jobs
        return [
            ops.lerp(job.base, job.models[0], alpha, dtype=job.dtype, out=job.out, name=job.name, labels=labels, check_finite=check_finite)
        ]
    outs, a, b = [job.target() for job in jobs], [job.base for job in jobs], [job.models[0] for job in jobs]
    names = [job.name for job in jobs]
    if ops.unwatched([*a, *b, *outs]):
        _lerp_many_impl(a, b, alpha, names, *labels, check_finite, outs)
    else:
        torch.ops.pymerge.lerp_many_out(a, b, alpha, names, *labels, check_finite, outs)
    return outs


def lerp_many_(a: Sequence[Tensor], b: Sequence[Tensor], alpha: float) -> None:
    """Each of `a` becomes the interpolation from it to its partner in `b`."""
    if ops.unwatched([*a, *b]):
        _lerp_many_inplace_impl(a, b, alpha)
    else:
        torch.ops.pymerge.lerp_many_(list(a), list(b), alpha)


def require_finite(label: str, named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise NonFiniteError for the first of (name, tensor) that has a NaN or an infinity; on a GPU all are looked at first, at once."""
    for device, members in _by_device(named, lambda pair: pair[1].device):
        backend = ops.backend_name(device)
        if backend == "triton" and ops._backend_for(device).all_finite([ops._flat(t) for _, t in members]):
            continue
        if backend == "native":
            members = [members[i] for i in _native_many().non_finite([ops._dense(t) for _, t in members])]
        for name, t in members:
            raise_if_not_finite([(label, t)], name)


def _native_many() -> ModuleType:
    ops._backend_for(torch.device("cpu"))
    from . import native_many

    return native_many


def _by_device(items: Sequence[T], device_of: Callable[[T], torch.device]) -> Iterator[tuple[torch.device, list[T]]]:
    groups: dict[torch.device, list[T]] = {}
    for item in items:
        groups.setdefault(device_of(item), []).append(item)
    return iter(groups.items())


# --------------------------------------------------------------------------------------------------------------------------------------
# Operators

_library = torch.library.Library("pymerge", "FRAGMENT")
_library.define(
    "merge_many_out(Tensor[] bases, Tensor[] models, float[] weights, float[] densities, str sparsify, bool elect, str tie_break, "
    "str vote, bool vote_weighted, str zero_vote, str divisor, str rescale, str k, float scale, int seed, float[] gammas, str scope, "
    "str[] names, bool check_finite, Tensor(a!)[] outs) -> ()"
)
_library.define(
    "lerp_many_out(Tensor[] a, Tensor[] b, float alpha, str[] names, str label_a, str label_b, bool check_finite, Tensor(a!)[] outs) -> ()"
)
_library.define("lerp_many_(Tensor(a!)[] a, Tensor[] b, float alpha) -> ()")


class _Bound(NamedTuple):
    """A job with its place to write: what a backend takes (contiguous, fp8 widened) and how that becomes the result."""

    job: Job
    base: Tensor | None
    models: list[Tensor]
    target: Tensor
    direct: bool

    @classmethod
    def of(cls, job: Job, prepared: Callable[[Tensor], Tensor]) -> _Bound:
        given = job.models if job.base is None else [*job.models, job.base]
        target, direct = ops._target(job.models[0], job.dtype, job.out, given, prepared)
        return cls(job, None if job.base is None else prepared(job.base), [prepared(x) for x in job.models], target, direct)

    def finish(self) -> None:
        if not self.direct:
            ops._finished(self.target, self.job.out.shape, self.job.dtype, self.job.out)


def _merge_many_impl(bases, models, *args) -> None:
    (*spec_args, scope, names, check_finite, outs) = args
    spec = ops._spec_from_args(*spec_args)
    spec = MergeSpec(**{**vars(spec), "convention": spec.convention.replace(scope=scope)})
    count = len(spec.weights)
    if len(models) != count * len(outs) or len(names) != len(outs) or (bases and len(bases) != len(outs)):
        raise ValueError(
            f"{len(models)} tensors, {len(bases)} base tensors and {len(names)} names do not make {len(outs)} merges of {count}"
        )
    jobs = [
        Job(name, bases[j] if bases else None, models[j * count : (j + 1) * count], out.dtype, out)
        for j, (name, out) in enumerate(zip(names, outs))
    ]  # fmt: skip
    for job in jobs:
        ops._check_alike([*job.models, *([] if job.base is None else [job.base]), job.out])
    _merge_all(jobs, spec, check_finite)


def _merge_all(jobs: Sequence[Job], spec: MergeSpec, check_finite: bool) -> None:
    for device, members in _by_device(jobs, lambda job: job.models[0].device):
        if in_one_go(device):
            finite = _merge_in_one_go(members, spec, device)
            suspects = members if check_finite and not finite else []
        else:
            suspects = _merge_here(members, spec, check_finite)
        for job in suspects if check_finite else ():
            ops._raise_if_not_finite(job.base, job.models, job.name)


def _merge_in_one_go(jobs: Sequence[Job], spec: MergeSpec, device: torch.device) -> Finite:
    backend = ops._backend_for(device)
    bound = [_Bound.of(job, ops._flat) for job in jobs]
    finite = backend.merge_many([backend.MergeJob(x.base, x.models, x.target, x.job.name) for x in bound], spec)
    for x in bound:
        x.finish()
    return finite


def _lerp_in_one_go(jobs: Sequence[Job], alpha: float, device: torch.device) -> Finite:
    bound = [_Bound.of(job, ops._flat) for job in jobs]
    finite = ops._backend_for(device).lerp_many([(x.base, x.models[0], x.target) for x in bound], alpha)
    for x in bound:
        x.finish()
    return finite


def _merge_here(jobs: Sequence[Job], spec: MergeSpec, check_finite: bool) -> list[Job]:
    """Merges where there is no other backend than the C++ core or the reference; returns which have a delta that is not finite."""
    together = spec.convention.scope == "model"
    if together:
        jobs = _of_one_arithmetic(jobs)
    if ops.backend_name(jobs[0].models[0].device) == "reference":
        _merge_by_reference(jobs, spec, together, check_finite)
        return []
    bound = [_Bound.of(job, ops._dense) for job in jobs]
    native = _native_many()
    found = native.merge_many([native.Row(x.job.name, x.base, x.models, x.target) for x in bound], spec, together=together)
    for x in bound:
        x.finish()
    return [jobs[i] for i in found]


def _merge_by_reference(jobs: Sequence[Job], spec: MergeSpec, together: bool, check_finite: bool) -> None:
    selections: list[Tensor | None] = [None] * len(jobs)
    balance = None
    if together and spec.trims:
        selections = _ranked_together(jobs, spec)
    if together and spec.elect and spec.convention.zero_vote == "majority":
        balance = sum(ops.vote_balance(j.base, j.models, spec, name=j.name, selection=s) for j, s in zip(jobs, selections))
    for job, selection in zip(jobs, selections):
        ops._merge_into(job.base, job.models, spec, job.name, selection, balance, job.dtype, check_finite, job.out)


def _of_one_arithmetic(jobs: Sequence[Job]) -> Sequence[Job]:
    """Magnitudes of fp32 and fp64 compare only when both are fp64: if one tensor computes in fp64, all do. One input is enough for that."""
    wide = [torch.float64 in {x.dtype for x in (job.base, *job.models) if x is not None} for job in jobs]
    if not any(wide) or all(wide):
        return jobs
    return [
        Job(job.name, None, [job.models[0].double(), *job.models[1:]], job.dtype, job.out)
        if job.base is None
        else Job(job.name, job.base.double(), job.models, job.dtype, job.out)
        for job in jobs
    ]


def _ranked_together(jobs: Sequence[Job], spec: MergeSpec) -> list[Tensor]:
    sizes = [job.models[0].numel() for job in jobs]
    (counts,) = spec.counts(sum(sizes))
    bases = None if jobs[0].base is None else [job.base for job in jobs]
    thresholds = ops.select(bases, [[job.models[i] for job in jobs] for i in range(len(counts))], counts, spec.convention.tie_break)
    selections, start = [], 0
    for size in sizes:
        # The cut counts from the model's first element; in a tensor it counts from the tensor's: -1 keeps no equal, size - 1 all.
        local = thresholds.clone()
        local[:, 1] = (local[:, 1] - start).clamp(-1, size - 1)
        selections.append(local)
        start += size
    return selections


def _lerp_many_impl(a, b, alpha, names, label_a, label_b, check_finite, outs) -> None:
    if not len(a) == len(b) == len(names) == len(outs):
        raise ValueError(f"{len(a)}, {len(b)}, {len(names)} and {len(outs)} tensors do not make pairs, names and results")
    for given in zip(a, b, outs):
        ops._check_alike(given)
    jobs = [Job(name, x, [y], out.dtype, out) for name, x, y, out in zip(names, a, b, outs)]
    for device, members in _by_device(jobs, lambda job: job.base.device):
        if in_one_go(device):
            finite = _lerp_in_one_go(members, alpha, device)
            suspects = members if check_finite and not finite else []
        else:
            suspects = _lerp_here(members, alpha, (label_a, label_b), check_finite)
        for job in suspects if check_finite else ():
            raise_if_not_finite([(label_a, job.base), (label_b, job.models[0])], job.name)


def _lerp_here(jobs: Sequence[Job], alpha: float, labels: tuple[str, str], check_finite: bool) -> list[Job]:
    """As :func:`_merge_here`."""
    if ops.backend_name(jobs[0].base.device) == "reference":
        for job in jobs:
            ops._lerp_into(job.base, job.models[0], alpha, job.dtype, job.name, labels, check_finite, job.out)
        return []
    bound = [_Bound.of(job, ops._dense) for job in jobs]
    found = _native_many().lerp_many([(x.base, x.models[0], x.target) for x in bound], alpha)
    for x in bound:
        x.finish()
    return [jobs[i] for i in found]


def _lerp_many_inplace_impl(a, b, alpha) -> None:
    _lerp_many_impl(a, b, alpha, [""] * len(a), "a", "b", False, a)


for _name, _impl in {
    "merge_many_out": _merge_many_impl, "lerp_many_out": _lerp_many_impl, "lerp_many_": _lerp_many_inplace_impl,
}.items():  # fmt: skip
    _library.impl(_name, _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("pymerge::merge_many_out")
def _(*args):
    return None


@torch.library.register_fake("pymerge::lerp_many_out")
def _(*args):
    return None


@torch.library.register_fake("pymerge::lerp_many_")
def _(a, b, alpha):
    return None
