"""Pairs up the tensors of several models: every error about names, shapes, devices and dtypes is raised here, before any arithmetic.

A model is a tensor, a mapping name -> tensor (a lazy one will do: only ``keys()`` and ``[name]`` are used, and tensors are asked for
one name at a time, once to check and once to merge), or an ``nn.Module``, which counts as its state dict. All models of one merge are of
one kind.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .many_ops import Job
from .ops import COMPUTED, PLAIN, WIDENED
from .plain import Plain
from .tree_errors import keys_that_differ, raise_all

__all__ = ["Facts", "Paired", "Source", "check_alike", "common_dtype", "span"]

MergeOne = Callable[[str, "Tensor | None", "list[Tensor]", torch.dtype, "Tensor | None"], Tensor]
MergeMany = Callable[["list[Job]"], "list[Tensor]"]
MergePlain = Callable[[Plain], None]


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of a result when none is asked for: torch's promotion; fp8 stays where all agree and counts as float32 otherwise."""
    if all(d == dtypes[0] for d in dtypes):
        return dtypes[0]
    return reduce(torch.promote_types, [torch.float32 if d in WIDENED else d for d in dtypes])


# --------------------------------------------------------------------------------------------------------------------------------------
# One model


class Facts(NamedTuple):
    """What is checked of a tensor; holding it does not hold the tensor."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    trouble: str = ""

    @classmethod
    def of(cls, t: Any, compiling: bool) -> Facts:
        if type(t) in PLAIN and not t.is_meta and t.layout is torch.strided and t.dtype in _ORDINARY and not (compiling or t.is_neg()):
            return tuple.__new__(cls, (t.shape, t.dtype, t.device, ""))  # nearly all are, and a model has many
        if not isinstance(t, Tensor):
            return cls((), torch.float32, torch.device("cpu"), f"is a {type(t).__name__}, not a tensor")
        trouble = ""
        if t.is_meta:
            trouble = "is a meta tensor: it has no values; load the weights first"
        elif t.layout is not torch.strided:
            trouble = f"is sparse ({str(t.layout).removeprefix('torch.')}); call .to_dense() first"
        elif t.dtype not in _ORDINARY:
            if t.is_quantized:
                trouble = "is quantised; dequantise it first"
            elif t.dtype.is_floating_point:
                trouble = f"is {_word(t.dtype)}; floating dtypes that can be merged are {', '.join(map(_word, COMPUTED + WIDENED))}"
        if not trouble and not compiling and t.is_neg():
            trouble = "is a lazily negated view, whose memory holds the opposite values; call .resolve_neg() first"
        return cls(t.shape, t.dtype, t.device, trouble)


_ORDINARY = frozenset(COMPUTED + WIDENED)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Source:
    """A model as named tensors; a bare tensor has the one name ``""``."""

    def __init__(self, model: Any, label: str) -> None:
        self.label = label
        if isinstance(model, Tensor):
            self.kind, self.tensors = "tensor", {"": model}
        elif isinstance(model, nn.Module):
            self.kind, self.tensors = "module", model.state_dict()
        elif isinstance(model, Mapping) or (hasattr(model, "keys") and hasattr(model, "__getitem__")):
            self.kind, self.tensors = "mapping", model
        else:
            raise TypeError(f"{label} is a {type(model).__name__}; a model is a tensor, a mapping name -> tensor or an nn.Module")
        self.names = tuple(self.tensors.keys())
        for name in self.names if {*map(type, self.names)} - {str} else ():
            if not isinstance(name, str):
                raise TypeError(f"{label} has the key {name!r}; names of tensors are strings")

    def __getitem__(self, name: str) -> Tensor:
        t = self.tensors[name]
        return t.detach() if t.requires_grad else t

    def survey(self) -> tuple[dict[str, Facts], dict[str, str]]:
        """Per name: what is to be checked; and per name of a tensor that has an earlier name, its first one.

        Asks for every tensor once, one at a time.
        """
        facts, tied, ties = {}, {}, _Ties()
        compiling, alone = torch.compiler.is_compiling(), self.kind == "tensor"
        for name in self.names:
            t = self.tensors[name]
            fact = facts[name] = Facts.of(t, compiling)
            if not alone and not fact.trouble:
                first = ties.first_name(t, name)
                if first is not name:
                    tied[name] = first
        return facts, tied


def span(t: Tensor) -> tuple[int, int]:
    """The range of addresses that a strided tensor's elements lie in; empty for no elements."""
    if t.numel() == 0:
        return (0, 0)
    if t.is_contiguous():
        return t.data_ptr(), t.data_ptr() + t.nbytes
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()


class _Ties:
    """Finds the names of one model that share one tensor.

    Addresses are reused as soon as a lazy mapping's tensor is freed, so an address counts only while the tensor seen there is alive.
    """

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[weakref.ref, str]]] = {}  # by address

    def first_name(self, t: Tensor, name: str) -> str:
        address = t.data_ptr()
        if not address:  # no elements
            return name
        if address not in self._seen:
            self._seen[address] = [(weakref.ref(t), name)]
            return name
        alive = [(other, first) for other, first in self._seen[address] if other() is not None]
        for other, first in alive:
            same = other()
            if (same.shape, same.stride(), same.dtype, same.device) == (t.shape, t.stride(), t.dtype, t.device):
                return first
        self._seen[address] = [*alive, (weakref.ref(t), name)]
        return name


# --------------------------------------------------------------------------------------------------------------------------------------
# Several models


def _about(label: str, name: str) -> str:
    return f"{label}: {name!r}" if name else label


def check_alike(labels: Sequence[str], facts: Sequence[Mapping[str, Facts]]) -> set[str]:
    """Raise unless all models have the first one's names, and per name its shape, its device and its kind of dtype.

    Returns the names whose dtypes differ, all of them floating.

    Raises:
        ValueError: names, shapes or devices differ.
        TypeError: a value is no dense tensor with values; a tensor is floating in one model and not in another.
    """
    reference, first = labels[0], facts[0]
    strange = [(label, have) for label, have in zip(labels[1:], facts[1:]) if have.keys() != first.keys()]
    differing = [keys_that_differ(label, have, reference, first) for label, have in strange]
    raise_all(ValueError, "{count} models do not have the same tensors", [d for d in differing if d])

    rows = [
        (label, name, have[name], want)
        for name, want in first.items()
        for label, have in zip(labels, facts)
        if have[name] != want or want.trouble
    ]
    broken = [f"{_about(label, name)} {have.trouble}" for label, name, have, _ in rows if have.trouble]
    raise_all(TypeError, "{count} tensors cannot be merged", broken)
    shapes = [f"{_about(a, n)} is {tuple(h.shape)}, {reference} is {tuple(w.shape)}" for a, n, h, w in rows if h.shape != w.shape]
    raise_all(ValueError, "{count} tensors differ in shape", shapes)
    devices = [f"{_about(a, n)} is on {h.device}, {reference} on {w.device}" for a, n, h, w in rows if h.device != w.device]
    raise_all(ValueError, "{count} tensors are on different devices", devices)
    kinds = [
        f"{_about(a, n)} is {_word(h.dtype)}, {reference} is {_word(w.dtype)}"
        for a, n, h, w in rows
        if h.dtype != w.dtype and not (h.dtype.is_floating_point and w.dtype.is_floating_point)
    ]
    raise_all(TypeError, "{count} tensors differ in their kind of dtype", kinds)
    return {name for _, name, _, _ in rows}


@dataclass
class _Group:
    """Tensors to merge together, and how many bytes of inputs more."""

    jobs: list[Job]
    room: float

    def merged(self, merge: MergeMany) -> Iterator[tuple[str, Tensor]]:
        return zip((job.name for job in self.jobs), merge(self.jobs))


class Paired:
    """Several models whose tensors fit together.

    Args:
        base: a model, or None where a method has no base; then the first model takes its part in the checks.
        models: a sequence of at least one model, of the base's kind.
        labels: what to call base and models in errors; by default "base", "model 0", "model 1", ...
        nonfloat: ``"equal"``: tensors that are not floating must be equal in all models, and are copied; ``"any"``: they may differ.
        needs_base: the method's name, where None as a base is an error.

    Attributes:
        count: how many models there are besides the base.
        kind: ``"tensor"``, ``"mapping"`` or ``"module"``.
        names: all names, in the first model's order.
        first_name: per name, the first name of the same tensor: another one where it is tied in every model.
        merged: the floating tensors, tied ones once.
        facts: per model, the base first: per name, shape, dtype and device.
        dtypes: per floating name, the common dtype.
        doubles: names whose merge computes in fp64 because a model has fp64 there.
        plain: the models, where their tensors are all plain; then nothing is wrong, and the five above are found when they are asked for.
    """

    first_name: dict[str, str]
    merged: tuple[str, ...]
    facts: tuple[dict[str, Facts], ...]
    dtypes: dict[str, torch.dtype]
    doubles: set[str]

    def __init__(
        self,
        base: Any,
        models: Sequence[Any],
        *,
        labels: Sequence[str] | None = None,
        nonfloat: str = "equal",
        needs_base: str | None = None,
    ) -> None:
        if base is None and needs_base is not None:
            raise TypeError(f"base is None; {needs_base} merges what models changed in a base, so it needs one")
        if isinstance(models, (Tensor, nn.Module, Mapping)) or hasattr(models, "keys"):
            raise TypeError(f"models is one {type(models).__name__}; pass a list of models")
        models = list(models)
        if not models:
            raise ValueError("no models given; pass a list of at least one")
        given = models if base is None else [base, *models]
        if labels is None:
            labels = [*([] if base is None else ["base"]), *(f"model {i}" for i in range(len(models)))]
        sources = [Source(model, label) for model, label in zip(given, labels)]
        odd = [f"{s.label} is a {s.kind}, {sources[0].label} is a {sources[0].kind}" for s in sources if s.kind != sources[0].kind]
        raise_all(TypeError, "{count} models are not of one kind (all tensors, all mappings or all modules)", odd)

        self._base = None if base is None else sources[0]
        self._models = sources if base is None else sources[1:]
        self.sources = sources
        self.count = len(models)
        self.kind = sources[0].kind
        self.names = sources[0].names
        self.plain = Plain.of(None if base is None else sources[0].tensors, [s.tensors for s in self._models])
        self._labels, self._nonfloat = labels, nonfloat
        if self.plain is None:
            self._survey()

    def __getattr__(self, name: str) -> Any:
        if name not in ("first_name", "merged", "facts", "dtypes", "doubles"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._survey()
        return self.__dict__[name]

    def _survey(self) -> None:
        facts, tied = zip(*(s.survey() for s in self.sources))
        differing = check_alike(self._labels, facts)
        self.facts = facts
        self.first_name = dict(zip(self.names, self.names))
        if all(tied):
            # Tied in some models only is not tied: names belong together when every model's own first names agree.
            groups: dict[tuple[str, ...], str] = {}
            self.first_name = {n: groups.setdefault(tuple(first.get(n, n) for first in tied), n) for n in self.names}
        floating = [n for n in self.names if facts[0][n].dtype.is_floating_point]
        self.merged = tuple(n for n in floating if self.first_name[n] == n)
        self.dtypes = {n: common_dtype([f[n].dtype for f in facts]) if n in differing else facts[0][n].dtype for n in floating}
        self.doubles = {n for n, dtype in self.dtypes.items() if dtype is torch.float64}
        if self._nonfloat == "equal":
            self._require_equal([n for n in self.names if n not in self.dtypes])

    def _require_equal(self, names: Sequence[str]) -> None:
        reference = self.sources[0]
        unequal = []
        for name in names:
            want = reference[name]
            unequal += [
                f"{_about(s.label, name)} ({_word(want.dtype)}) differs from {reference.label}'s; only equal integers can be kept"
                for s in self.sources[1:]
                if not torch.equal(s[name], want)
            ]
        raise_all(ValueError, "{count} tensors that are not floating differ", unequal)

    def tensors(self, name: str) -> tuple[Tensor | None, list[Tensor]]:
        """The base's tensor, if there is a base, and the models'."""
        return (None if self._base is None else self._base[name]), [m[name] for m in self._models]

    def result(self, merge_one: MergeOne, *, dtype: torch.dtype | None = None, out: Any = None) -> Any:
        """The merged model: a tensor, or a dict in the order of `names`; tied names hold one tensor object.

        `merge_one(name, base, models, dtype, out)` merges one floating tensor. Others are copied. With `out`, results are written there
        and `out` is returned.

        Raises:
            TypeError: `dtype` is no supported floating dtype, or `out` is of another kind.
            ValueError: `out` has other names, shapes or devices, a dtype that is not `dtype`, or shares memory with an input.
        """

        def merge_alone(jobs: Sequence[Job]) -> list[Tensor]:
            return [merge_one(job.name, job.base, job.models, job.dtype, job.out) for job in jobs]

        return self.result_of_many(merge_alone, lambda device: 0, dtype=dtype, out=out)

    def _plain_places(self, dtype: torch.dtype | None, out: Any) -> list[Tensor] | None:
        """Where :attr:`plain`'s results go; None where there is none or `out` is not plain."""
        if self.plain is None or out is None:
            return None if self.plain is None else self.plain.place(dtype, None)
        place = Source(out, "out")
        return self.plain.place(dtype, place.tensors) if place.kind == self.kind else None

    def result_of_many(
        self,
        merge: MergeMany,
        together: Callable[[torch.device], float],
        *,
        merge_plain: MergePlain | None = None,
        dtype: torch.dtype | None = None,
        out: Any = None,
    ) -> Any:
        """:meth:`result`, where `merge` takes lists: of tensors on a device whose inputs are `together` bytes, or a little more.

        `merge_plain` does the same for all tensors at once where they, and `out`'s, are plain.
        """
        if dtype is not None and dtype not in COMPUTED + WIDENED:
            raise TypeError(f"dtype is {dtype}; choose one of {', '.join(map(_word, COMPUTED + WIDENED))}")
        places = None if merge_plain is None else self._plain_places(dtype, out)
        if places is not None:
            merge_plain(self.plain)
            return out if out is not None else places[0] if self.kind == "tensor" else dict(zip(self.names, places))
        target = None if out is None else self.writable(out, "out", dtype)
        result: dict[str, Tensor] = {}
        groups: dict[torch.device, _Group] = {}
        for name in self.names:
            if self.first_name[name] != name:
                continue
            to = None if target is None else target[name]
            base, models = self.tensors(name)
            if name in self.dtypes:
                job = Job(name, base, models, (dtype or self.dtypes[name]) if to is None else to.dtype, to)
                device = self.facts[0][name].device
                if device not in groups:
                    groups[device] = _Group([], 0 if self.kind == "tensor" else together(device))
                group = groups[device]
                group.jobs.append(job)
                if group.room > 0:
                    group.room -= len(self.sources) * models[0].nbytes
                if group.room <= 0:
                    result |= group.merged(merge)
                    del groups[device]
            else:
                value = models[0] if base is None else base
                result[name] = value.clone() if to is None else to.copy_(value)
        for group in groups.values():
            result |= group.merged(merge)
        if target is None:
            return result[""] if self.kind == "tensor" else {name: result[self.first_name[name]] for name in self.names}
        for name, first in self.first_name.items():
            if name != first and target[name].data_ptr() != result[first].data_ptr():
                target[name].copy_(result[first])
        return out

    def writable(self, out: Any, label: str, dtype: torch.dtype | None = None) -> Source:
        """`out` as a place for the results, checked."""
        target = Source(out, label)
        same = target.kind == self.kind or {target.kind, self.kind} == {"mapping", "module"}
        if not same:
            raise TypeError(f"{label} is a {target.kind}, the models are {self.kind}s")
        facts, _ = target.survey()
        check_alike([self.sources[0].label, label], [self.facts[0], facts])
        if dtype is not None:
            wrong = [n for n in self.dtypes if facts[n].dtype != dtype]
            problems = [f"{_about(label, n)} is {_word(facts[n].dtype)}, but dtype={_word(dtype)} was asked for" for n in wrong]
            raise_all(ValueError, "{count} tensors have another dtype than the one asked for", problems)
        self.check_apart(target)
        return target

    def check_apart(self, target: Source, inputs: Sequence[Source] | None = None) -> None:
        """Raise ValueError where `target`'s tensors share memory with each other (but for tied names) or with an input's."""
        kept = {name: target[name] for name in self.names}
        spans = sorted((*span(t), name) for name, t in kept.items() if t.numel())
        shared = []
        for name, t in kept.items():
            if not t.is_contiguous() and any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride())):
                shared.append(f"{_about(target.label, name)} is an expanded tensor: its elements share memory")
        for (_, end, one), (start, _, other) in zip(spans, spans[1:]):
            if start < end and not (self.first_name[one] == self.first_name[other] and span(kept[one]) == span(kept[other])):
                shared.append(f"{_about(target.label, one)} and {other!r} share memory and are not tied in every model")
        for name in self.names:
            for source in self.sources if inputs is None else inputs:
                low, high = span(source[name])
                # The results lie apart, so if any reaches into the input, the last one that starts before the input's end does.
                at = bisect.bisect_left(spans, (high, 0, "")) - 1
                if at >= 0 and low < spans[at][1]:
                    of = f"{source.label}'s {name!r}" if name else source.label
                    shared.append(f"{_about(target.label, spans[at][2])} shares memory with {of}")
        raise_all(ValueError, "{count} tensors share memory", shared)
