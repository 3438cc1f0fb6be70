"""torch.library operators of the merge core, and the choice of a backend: the only module that knows the backends.

Operators: ``torch.ops.pymerge.merge``, ``merge_out``, ``select``, ``vote_balance``, ``lerp``, ``lerp_out``, ``lerp_`` and ``dots``. They
take tensors of any shape and stride; autograd does not pass through them. Importing this module registers them (``import pymerge`` alone
does not import torch). The Python functions of the same names below wrap them with typed arguments; the methods call those.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import fresh, reference
from .conventions import Convention
from .finite import NonFiniteError, raise_if_not_finite
from .spec import MergeSpec

__all__ = ["NonFiniteError", "backend", "dots", "lerp", "lerp_", "merge", "select", "vote_balance"]

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDENED = tuple(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz") if hasattr(torch, name)
)


# --------------------------------------------------------------------------------------------------------------------------------------
# Backends

BACKENDS = ("native", "triton", "reference")
_forced: ContextVar[str | None] = ContextVar("pymerge_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block: ``"native"`` (C++, CPU tensors), ``"triton"`` (GPU tensors) or ``"reference"`` (torch).

    The environment variable PYMERGE_BACKEND does the same for a process. A backend that cannot take the inputs is an error.
    """
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist; choose one of {', '.join(map(repr, BACKENDS))}")
    return name


@cache
def _import_triton() -> tuple[ModuleType | None, str]:
    """The Triton backend, or why it cannot be had."""
    try:
        from . import triton_backend
    except ImportError as error:
        return None, str(error)
    return triton_backend, ""


def _triton_problem(device: torch.device) -> str:
    """Why tensors on `device` cannot go to the Triton backend, or an empty string. ROCm's tensors are on "cuda" too."""
    module, problem = _import_triton()
    if module is None:
        return f"backend 'triton' cannot be used: {problem}"
    if module.INTERPRETED:
        return "" if device.type == "cpu" else f"backend 'triton' takes CPU tensors under TRITON_INTERPRET=1; these are on {device}"
    if device.type == "cuda":
        return ""
    return f"backend 'triton' takes GPU tensors, or CPU tensors under TRITON_INTERPRET=1, slowly; these are on {device}"


def forced_backend() -> str | None:
    """The backend that :func:`backend` or PYMERGE_BACKEND insists on."""
    return _forced.get() or os.environ.get("PYMERGE_BACKEND")


def backend_name(device: torch.device) -> str:
    """The backend for tensors on `device`; errors as :func:`require_backend` has them."""
    name = forced_backend()
    if name is None:
        name = "native" if device.type == "cpu" else "triton" if device.type == "cuda" and not _triton_problem(device) else "reference"
    if _checked(name) == "triton":
        problem = _triton_problem(device)
        if problem:
            raise ValueError(problem)
    if name == "native" and device.type != "cpu":
        raise ValueError(f"backend 'native' takes CPU tensors; these are on {device}")
    return name


def _backend_for(device: torch.device) -> ModuleType:
    name = backend_name(device)
    if name == "reference":
        return reference
    if name == "triton":
        return _import_triton()[0]
    from . import native

    return native


def require_backend(device: torch.device) -> None:
    """Raise unless tensors on `device` can be merged under the environment's settings, before any work is done.

    Raises:
        ImportError: the C++ core cannot be loaded, or PYMERGE_ISA names an instruction set that is not there.
        ValueError: PYMERGE_BACKEND names no backend, or one that is not installed or for other devices.
    """
    _backend_for(device)


PLAIN = frozenset((Tensor, torch.nn.Parameter))


def unwatched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether calling an operator would call its implementation and nothing else, so that it can be left out: nobody traces or transforms.

    On small tensors an operator's many arguments cost more than the work.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() or _transforms() is not None:
        return False
    return {*map(type, tensors)} - {type(None)} <= PLAIN


# torch has no public way to ask; where these are not, operators are called always.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: "unknown")


# --------------------------------------------------------------------------------------------------------------------------------------
# Preparing tensors for a backend


def _flat(t: Tensor) -> Tensor:
    """`t` as any backend takes it: detached, contiguous, one-dimensional, fp8 widened."""
    return _dense(t).detach().view(-1)


def _dense(t: Tensor) -> Tensor:
    """`t` as the C++ core takes it, which asks for an address and a size: contiguous, fp8 widened."""
    if t.dtype not in COMPUTED:
        if t.dtype not in WIDENED:
            names = ", ".join(str(d).removeprefix("torch.") for d in COMPUTED)
            raise TypeError(f"cannot merge tensors of dtype {t.dtype}; supported: {names} and the float8 types")
        t = t.to(torch.float32)
    return t if t.is_contiguous() else t.detach().contiguous()


def _check_alike(tensors: Sequence[Tensor]) -> None:
    first, shape, device = tensors[0], tensors[0].shape, tensors[0].device
    for t in tensors[1:]:
        if t is first:  # a result that is the first input
            continue
        if t.shape != shape:
            raise ValueError(f"shapes differ: {tuple(shape)} and {tuple(t.shape)}")
        if t.device != device:
            raise ValueError(f"devices differ: {device} and {t.device}")


def _raise_if_not_finite(base: Tensor | None, models: Sequence[Tensor], name: str) -> None:
    raise_if_not_finite([("base", base), *((f"model {i}", x) for i, x in enumerate(models))], name)


# --------------------------------------------------------------------------------------------------------------------------------------
# Operators

_SPEC_SCHEMA = (
    "Tensor? base, Tensor[] models, float[] weights, float[] densities, str sparsify, bool elect, str tie_break, str vote, "
    "bool vote_weighted, str zero_vote, str divisor, str rescale, str k, float scale, int seed, "
    "float[] gammas, str name, Tensor? selection"
)

_library = torch.library.Library("pymerge", "DEF")
_library.define(f"merge({_SPEC_SCHEMA}, int? balance, ScalarType dtype, bool check_finite) -> Tensor")
_library.define(f"merge_out({_SPEC_SCHEMA}, int? balance, bool check_finite, Tensor(a!) out) -> ()")
_library.define(f"vote_balance({_SPEC_SCHEMA}) -> Tensor")
_library.define("select(Tensor[] bases, Tensor[] models, int[] counts, str tie_break) -> Tensor")
_LABELS = 'str name="", str label_a="a", str label_b="b", bool check_finite=False'
_library.define(f"lerp(Tensor a, Tensor b, float alpha, ScalarType dtype, {_LABELS}) -> Tensor")
_library.define(f"lerp_out(Tensor a, Tensor b, float alpha, Tensor(a!) out, {_LABELS}) -> ()")
_library.define("lerp_(Tensor(a!) a, Tensor b, float alpha) -> ()")
_library.define("dots(Tensor a, Tensor b) -> Tensor")


def _spec_args(base, models, spec: MergeSpec, name: str, selection) -> tuple:
    c = spec.convention
    # The schema's int is signed: a seed of 2**63 and more travels as its two's complement.
    seed = spec.seed - 2**64 if spec.seed >= 2**63 else spec.seed
    return (
        base, list(models), list(spec.weights), list(spec.densities), spec.sparsify, spec.elect, c.tie_break, c.vote, c.vote_weighted,
        c.zero_vote, c.divisor, c.rescale, c.k, spec.scale, seed, list(spec.gammas), name, selection,
    )  # fmt: skip


def _spec_from_args(
    weights, densities, sparsify, elect, tie_break, vote, vote_weighted, zero_vote, divisor, rescale, k, scale, seed, gammas
) -> MergeSpec:
    convention = Convention(
        tie_break=tie_break, vote=vote, vote_weighted=vote_weighted, zero_vote=zero_vote, divisor=divisor, rescale=rescale, k=k
    )
    return MergeSpec(tuple(weights), tuple(densities), sparsify, elect, convention, scale, seed % 2**64, tuple(gammas))


def _merge_impl(*args) -> Tensor:
    (base, models, *spec_args, name, selection, balance, dtype, check_finite) = args
    return _merge_into(base, models, _spec_from_args(*spec_args), name, selection, balance, dtype, check_finite, None)


def _merge_out_impl(*args) -> None:
    (base, models, *spec_args, name, selection, balance, check_finite, out) = args
    _merge_into(base, models, _spec_from_args(*spec_args), name, selection, balance, out.dtype, check_finite, out)


def _merge_into(base, models, spec, name, selection, balance, dtype, check_finite, out) -> Tensor:
    given = [*models, *([] if base is None else [base])]
    _check_alike([*given, *([] if out is None else [out])])
    shape, device = models[0].shape, models[0].device
    impl = _backend_for(device)
    prepared = _dense if backend_name(device) == "native" else _flat
    flat_base, flat = (None if base is None else prepared(base)), [prepared(x) for x in models]
    if impl is reference:
        if check_finite:
            _raise_if_not_finite(base, models, name)
        result = reference.merge(flat_base, flat, spec, name=name, selection=selection, balance=balance, dtype=dtype).view(shape)
        return result if out is None else out.copy_(result)
    target, direct = _target(models[0], dtype, out, given)
    finite = impl.merge(flat_base, flat, spec, target, name=name, selection=selection, balance=balance)
    if check_finite and not finite:  # a delta overflowed or an input is not finite: only the latter is an error
        _raise_if_not_finite(base, models, name)
    return out if direct else _finished(target, shape, dtype, out)


def _target(
    like: Tensor,
    dtype: torch.dtype,
    out: Tensor | None,
    given: Sequence[Tensor],
    prepared: Callable[[Tensor], Tensor] = _flat,
) -> tuple[Tensor, bool]:
    """A tensor for a backend to write into, as `prepared` makes it or flat, and whether it is `out` itself."""
    if out is not None and out.is_contiguous() and dtype in COMPUTED:
        return prepared(out), True
    # fp8 is rounded afterwards, from the dtype of the arithmetic: once, also when that is fp64.
    wide = dtype if dtype in COMPUTED else reference.compute_dtype(given)
    return fresh.empty((like.numel(),), wide, like.device), False


def _finished(target: Tensor, shape: torch.Size, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    result = reference.round_to(target.view(shape), dtype)
    return result if out is None else out.copy_(result)


def _vote_balance_impl(*args) -> Tensor:
    (base, models, *spec_args, name, selection) = args
    _check_alike([*models, *([] if base is None else [base])])
    impl = _backend_for(models[0].device)
    spec = _spec_from_args(*spec_args)
    flat_base, flat = (None if base is None else _flat(base)), [_flat(x) for x in models]
    return torch.tensor(impl.vote_balance(flat_base, flat, spec, name=name, selection=selection), dtype=torch.int64)


def _select_impl(bases, models, counts, tie_break) -> Tensor:
    if not counts or len(models) % len(counts) or (bases and len(bases) * len(counts) != len(models)):
        raise ValueError(f"{len(models)} tensors and {len(bases)} base tensors do not make {len(counts)} models")
    per_model = len(models) // len(counts)
    rows = [models[i * per_model : (i + 1) * per_model] for i in range(len(counts))]
    for j in range(per_model):
        _check_alike([row[j] for row in rows] + ([bases[j]] if bases else []))
    device = models[0].device if models else torch.device("cpu")
    flat = [[_flat(t) for t in row] for row in rows]
    return _backend_for(device).select([_flat(t) for t in bases] or None, flat, counts, tie_break)


def _lerp_impl(a, b, alpha, dtype, name="", label_a="a", label_b="b", check_finite=False) -> Tensor:
    return _lerp_into(a, b, alpha, dtype, name, (label_a, label_b), check_finite, None)


def _lerp_out_impl(a, b, alpha, out, name="", label_a="a", label_b="b", check_finite=False) -> None:
    _lerp_into(a, b, alpha, out.dtype, name, (label_a, label_b), check_finite, out)


def _lerp_inplace_impl(a, b, alpha) -> None:
    _lerp_into(a, b, alpha, a.dtype, "", ("a", "b"), False, a)


def _lerp_into(a, b, alpha, dtype, name, labels, check_finite, out) -> Tensor:
    _check_alike([a, b, *([] if out is None else [out])])
    impl = _backend_for(a.device)
    if impl is reference:
        if check_finite:
            raise_if_not_finite(zip(labels, (a, b)), name)
        result = reference.lerp(_flat(a), _flat(b), alpha, dtype).view(a.shape)
        return result if out is None else out.copy_(result)
    target, direct = _target(a, dtype, out, [a, b])
    finite = impl.lerp(_flat(a), _flat(b), alpha, target)
    if check_finite and not finite:  # as in _merge_into
        raise_if_not_finite(zip(labels, (a, b)), name)
    return out if direct else _finished(target, a.shape, dtype, out)


def _dots_impl(a, b) -> Tensor:
    _check_alike([a, b])
    return _backend_for(a.device).dots(_flat(a), _flat(b))


for _name, _impl in {
    "merge": _merge_impl,
    "merge_out": _merge_out_impl,
    "vote_balance": _vote_balance_impl,
    "select": _select_impl,
    "lerp": _lerp_impl,
    "lerp_out": _lerp_out_impl,
    "lerp_": _lerp_inplace_impl,
    "dots": _dots_impl,
}.items():
    _library.impl(_name, _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("pymerge::merge")
def _(base, models, *args):
    return torch.empty(models[0].shape, dtype=args[-2], device=models[0].device)


@torch.library.register_fake("pymerge::merge_out")
def _(*args):
    return None


@torch.library.register_fake("pymerge::vote_balance")
def _(*args):
    return torch.empty((), dtype=torch.int64)


@torch.library.register_fake("pymerge::select")
def _(bases, models, counts, tie_break):
    return torch.empty((len(counts), 2), dtype=torch.int64)


@torch.library.register_fake("pymerge::lerp")
def _(a, b, alpha, dtype, *args, **kwargs):
    return torch.empty(a.shape, dtype=dtype, device=a.device)


@torch.library.register_fake("pymerge::lerp_out")
def _(*args, **kwargs):
    return None


@torch.library.register_fake("pymerge::lerp_")
def _(a, b, alpha):
    return None


@torch.library.register_fake("pymerge::dots")
def _(a, b):
    return torch.empty(3, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------------------------------
# Typed wrappers


def merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    spec: MergeSpec,
    *,
    name: str = "",
    selection: Tensor | None = None,
    balance: int | None = None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    check_finite: bool = True,
) -> Tensor:
    """The fused merge of one tensor, see :func:`pymerge.reference.merge`; tensors of equal shape.

    With `out` the result is written there (`dtype` must be its dtype); when an error is raised its contents are unspecified.

    Raises:
        NonFiniteError: an input has NaN or Inf and `check_finite` is set.
        ValueError: shapes or devices differ.
        TypeError: a dtype that cannot be merged.
    """
    if unwatched((base, *models, selection, out)):
        return _merge_into(base, models, spec, name, selection, balance, dtype, check_finite, out)
    args = _spec_args(base, models, spec, name, selection)
    if out is None:
        return torch.ops.pymerge.merge(*args, balance, dtype, check_finite)
    torch.ops.pymerge.merge_out(*args, balance, check_finite, out)
    return out


def vote_balance(base, models, spec: MergeSpec, *, name: str = "", selection: Tensor | None = None) -> int:
    """Sum over the elements of the sign of the vote, see :func:`pymerge.reference.vote_balance`."""
    return int(torch.ops.pymerge.vote_balance(*_spec_args(base, models, spec, name, selection)))


def select(bases: Sequence[Tensor] | None, models: Sequence[Sequence[Tensor]], counts: Sequence[int], tie_break: str = "first") -> Tensor:
    """Thresholds of the k largest magnitudes over one or many tensors, see :func:`pymerge.reference.select`."""
    return torch.ops.pymerge.select(list(bases or ()), [t for row in models for t in row], list(counts), tie_break)


def lerp(
    a: Tensor,
    b: Tensor,
    alpha: float,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
    name: str = "",
    labels: tuple[str, str] = ("a", "b"),
    check_finite: bool = True,
) -> Tensor:
    """Linear interpolation from a to b, see :func:`pymerge.reference.lerp`; `out`, `name` and errors as :func:`merge` has them."""
    if unwatched((a, b, out)):
        return _lerp_into(a, b, alpha, dtype, name, labels, check_finite, out)
    if out is None:
        return torch.ops.pymerge.lerp(a, b, alpha, dtype, name, *labels, check_finite)
    torch.ops.pymerge.lerp_out(a, b, alpha, out, name, *labels, check_finite)
    return out


def lerp_(a: Tensor, b: Tensor, alpha: float) -> None:
    """:func:`lerp` into `a`."""
    torch.ops.pymerge.lerp_(a, b, alpha)


def dots(a: Tensor, b: Tensor) -> Tensor:
    """fp64 ``[3]``: a·a, b·b, a·b, see :func:`pymerge.reference.dots`."""
    return torch.ops.pymerge.dots(a, b)
