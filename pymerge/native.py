"""The C++ backend: the functions of :mod:`pymerge.reference` on flat, contiguous CPU tensors, with the same results, bit for bit.

PYMERGE_ISA=scalar|avx2|avx512|neon chooses the instruction set for a process; the default is the best that the CPU has.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .reference import compute_dtype
from .spec import MergeSpec, tensor_id

__all__ = [
    "StreamedSelection",
    "add_low_rank",
    "available_isas",
    "current_isa",
    "delta_sums",
    "dots",
    "lerp",
    "merge",
    "select",
    "use_isa",
    "vote_balance",
]

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_SPARSIFY = {"none": 0, "magnitude": 1, "bernoulli": 2, "band": 3}
_VOTE = {"mass": 1, "count": 2}
_ZERO_VOTE = {"positive": 0, "negative": 1, "drop": 2}
_DIVISOR = {"none": 0, "weights": 1, "count": 2}
_RESCALE = {"none": 0, "density": 1, "norm": 2}


def _load() -> ModuleType:
    folder = os.environ.get("PYMERGE_NATIVE_DIR")  # another build of the extension, the one with sanitizers say
    try:
        if folder is None:
            from . import _native as module
        else:
            file = next(name for name in sorted(os.listdir(folder)) if name.startswith("_native") and name.endswith(".so"))
            spec = importlib.util.spec_from_file_location("pymerge._native", os.path.join(folder, file))
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except (ImportError, StopIteration) as error:
        raise ImportError(
            f"pymerge's C++ core cannot be loaded ({error}). Reinstall pymerge-kernels with a C++17 compiler at hand, or set "
            "PYMERGE_BACKEND=reference to do without it, slowly"
        ) from error
    try:
        module.use_isa(os.environ.get("PYMERGE_ISA", ""))
    except ValueError as error:
        raise ImportError(f"PYMERGE_ISA: {error}") from error
    return module


_core = _load()


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build has and this CPU can run, slowest first."""
    return tuple(_core.available_isas())


def current_isa() -> str:
    """The instruction set in use."""
    return _core.current_isa()


def use_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process; ``""`` is the best. ValueError when it is not available."""
    _core.use_isa(name)


def _arg(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), _DTYPE[t.dtype])


def _wide(tensors: Sequence[Tensor | None]) -> bool:
    return compute_dtype([t for t in tensors if t is not None]) == torch.float64


def _options(
    spec: MergeSpec,
    n: int,
    name: str,
    selection: Tensor | None,
    balance: int | None,
    factors: Sequence[float] | None = None,
    first: int = 0,
) -> dict:
    c = spec.convention
    majority = c.zero_vote == "majority"
    zero_vote = c.zero_vote
    if majority:
        zero_vote = "positive" if balance is not None and balance > 0 else "negative"
    return {
        "sparsify": _SPARSIFY[spec.sparsify],
        "vote": _VOTE[c.vote] if spec.elect else 0,
        "vote_weighted": c.vote_weighted,
        "zero_vote": _ZERO_VOTE[zero_vote],
        "majority": majority and spec.elect and balance is None,
        "divisor": _DIVISOR[c.divisor],
        "rescale": _RESCALE[c.rescale],
        "tie_all": c.tie_break == "all",
        "scale": spec.scale,
        "seed": spec.seed,
        "tensor_id": tensor_id(name),
        "weights": list(spec.weights),
        "densities": list(spec.densities),
        "counts": spec.counts(n)[0],
        "keep_below": [round(density * 2**32) for density in spec.densities],
        "factors": [] if factors is None else list(factors),
        "first": first,
        "selection": [] if selection is None else [tuple(row) for row in selection.tolist()],
    }


def _band(base: Tensor | None, models: Sequence[Tensor], spec: MergeSpec, selection: Tensor | None) -> Tensor | None:
    """`selection`, or a band's, whose two ends are two selections; the core finds a single one itself."""
    if selection is not None or spec.sparsify != "band":
        return selection
    bases, rows = None if base is None else [base], [[x] for x in models]
    return torch.cat([select(bases, rows, counts, spec.convention.tie_break) for counts in spec.counts(models[0].numel())])


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
) -> bool:
    """:func:`pymerge.reference.merge` into `out`; False when some delta is NaN or infinite. `first` is a multiple of 4096."""
    options = _options(spec, out.numel(), name, _band(base, models, spec, selection), balance, factors, first)
    f64 = _wide([base, *models])
    return _core.merge(out.numel(), f64, _arg(base), [_arg(x) for x in models], _arg(out), options, torch.get_num_threads())


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
    n = models[0].numel()
    options = _options(spec, n, name, _band(base, models, spec, selection), None, factors, first)
    options["vote"] = _VOTE[spec.convention.vote]
    return _core.vote_balance(n, _wide([base, *models]), _arg(base), [_arg(x) for x in models], options, torch.get_num_threads())


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
    """See :func:`pymerge.reference.delta_sums`; `first` is a multiple of 4096."""
    n = models[0].numel()
    options = _options(spec, n, name, _band(base, models, spec, selection), None, None, first)
    f64 = _wide([base, *models])
    return _core.abs_sums(n, f64, _arg(base), [_arg(x) for x in models], options, list(sums), torch.get_num_threads())


def select(bases: Sequence[Tensor] | None, models: Sequence[Sequence[Tensor]], counts: Sequence[int], tie_break: str = "first") -> Tensor:
    """See :func:`pymerge.reference.select`."""
    tensors = [
        (models[0][j].numel(), _arg(bases[j] if bases else None), [_arg(model[j]) for model in models]) for j in range(len(models[0]))
    ]
    f64 = _wide([*(bases or ()), *(t for model in models for t in model)])
    rows = _core.select(tensors, f64, list(counts), tie_break == "all", torch.get_num_threads())
    return torch.tensor(rows, dtype=torch.int64).reshape(len(counts), 2)


def lerp(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> bool:
    """:func:`pymerge.reference.lerp` into `out`, which may be `a`; False when some b - a is NaN or infinite."""
    near_a = alpha < 0.5
    weight = alpha if near_a else 1.0 - alpha
    return _core.lerp(a.numel(), _wide([a, b]), _arg(a), _arg(b), near_a, weight, _arg(out), torch.get_num_threads())


def dots(a: Tensor, b: Tensor, sums: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """See :func:`pymerge.reference.dots`."""
    return torch.tensor(_core.dots(a.numel(), _wide([a, b]), _arg(a), _arg(b), list(sums), torch.get_num_threads()), dtype=torch.float64)


def add_low_rank(x: Tensor, first: int, left: Tensor, right: Tensor, scale: float) -> None:
    """See :func:`pymerge.checkpoint.lora.product.add_product`; x of fp32, bf16 or fp16, contiguous factors of fp32."""
    rank, columns = right.shape
    _core.add_low_rank(x.numel(), _arg(x), first, columns, rank, left.data_ptr(), right.data_ptr(), scale, torch.get_num_threads())


class StreamedSelection:
    """See :class:`pymerge.reference.StreamedSelection`; memory and passes are bounded here."""

    def __init__(self, n: int, counts: Sequence[int], tie_break: str, f64: bool, limit: int) -> None:
        self._core = _core.StreamedSelection(n, list(counts), tie_break == "all", f64, limit)
        self._f64 = f64

    @property
    def searched(self) -> int:
        return self._core.searched()

    def sample_ranges(self) -> list[tuple[int, int]]:
        return self._core.sample_ranges()

    def sample(self, base: Tensor | None, models: Sequence[Tensor]) -> None:
        self._core.sample(*self._part(base, models, 0))

    def add(self, base: Tensor | None, models: Sequence[Tensor], first: int) -> None:
        self._core.add(*self._part(base, models, first), torch.get_num_threads())

    def guesses(self) -> Tensor:
        return torch.tensor(self._core.guesses(torch.get_num_threads()), dtype=torch.int64).reshape(-1, 2)

    def strayed(self) -> list[int]:
        return self._core.strayed()

    def end_pass(self) -> bool:
        return self._core.end_pass(torch.get_num_threads())

    def lookups(self) -> list[tuple[int, int]]:
        return self._core.lookups()

    def look(self, lookup: int, base: Tensor | None, models: Sequence[Tensor], first: int) -> None:
        self._core.look(lookup, *self._part(base, models, first))

    def rows(self) -> Tensor:
        return torch.tensor(self._core.rows(), dtype=torch.int64).reshape(-1, 2)

    def _part(self, base: Tensor | None, models: Sequence[Tensor], first: int) -> tuple:
        return models[0].numel(), first, self._f64, _arg(base), [_arg(x) for x in models]
