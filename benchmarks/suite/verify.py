"""A result is right, or it has no speed.

Three looks at it, none of which shares the code of the run that is timed:

* parts of it are, bit for bit, what the oracle (pymerge/reference.py) makes of the same elements. Which elements TIES keeps of the whole
  tensor is found here by counting the bits of all magnitudes, and given to the oracle;
* all of it is, bit for bit, what another instruction set makes with another number of threads;
* every rival's result is compared with it, see `agreement`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pymerge import native, reference_diagnose
from pymerge.diagnose_ops import new_statistics
from pymerge.spec import MergeSpec

from .inputs import Inputs, tensors
from .methods import METHODS, oracle

__all__ = ["Wrong", "agreement", "select_by_counting", "slope", "verify"]

WHOLE = 2**20
"""Elements of one tensor up to which the oracle makes all of it; of larger ones it makes :data:`PARTS` parts."""
PART, PARTS = 2**16, 12
TENSORS = 8
"""Tensors of a state dict that the oracle makes."""
_CHUNK = 2**24


class Wrong(AssertionError):
    """A result is not what it should be."""


def verify(method: str, inputs: Inputs, density: float) -> str:
    """Run the method and check its result, which is in ``inputs.out`` afterwards.

    Returns:
        What it was compared with, for the report.

    Raises:
        Wrong: the result is wrong, and where.
    """
    chosen = METHODS[method]
    if not chosen.writes:
        return _verify_diagnosis(inputs, density)
    before = [x.clone() for x in tensors(inputs.out)] if chosen.updates else None
    _set(inputs.out, before)
    chosen.run(inputs, density)
    looked_at = _against_oracle(method, inputs, density, before)
    isas, threads = native.available_isas(), torch.get_num_threads()
    if len(isas) > 1:
        second = Inputs(inputs.base, inputs.models, _like(inputs.out), inputs.layout, inputs.dtype)
        _set(second.out, before)
        with _otherwise(threads) as isa:
            chosen.run(second, density)
        for a, b in zip(tensors(inputs.out), tensors(second.out)):
            _same(a, b, f"{method}: the result of {isa} on another number of threads", 0)
        looked_at += f"; all of it {isa}'s"
    return looked_at


def _set(out: Tensor | Mapping[str, Tensor], values: list[Tensor] | None) -> None:
    """The state before an update, or what shows where nothing was written."""
    for i, x in enumerate(tensors(out)):
        x.fill_(torch.nan) if values is None else x.copy_(values[i])


def _like(out: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    return torch.empty_like(out) if isinstance(out, Tensor) else {name: torch.empty_like(x) for name, x in out.items()}


class _otherwise:
    """Another instruction set than the one in use, on one thread, or on two where one is in use."""

    def __init__(self, threads: int) -> None:
        self.threads, self.isa = threads, native.current_isa()

    def __enter__(self) -> str:
        isas = native.available_isas()
        other = isas[isas.index(self.isa) - 1]  # the next slower one, or the fastest after the slowest
        native.use_isa(other)
        torch.set_num_threads(1 if self.threads > 1 else 2)
        return other

    def __exit__(self, *_) -> None:
        native.use_isa(self.isa)
        torch.set_num_threads(self.threads)


# --------------------------------------------------------------------------------------------------------------------------------------
# The oracle


def _against_oracle(method: str, inputs: Inputs, density: float, before: list[Tensor] | None) -> str:
    if isinstance(inputs.out, Tensor):
        checked = _check_tensor(method, "", inputs.base, inputs.models, inputs.out, before and before[0], density)
        return "all elements are the oracle's" if checked == inputs.elements else f"{checked} elements are the oracle's"
    names = list(inputs.out)
    some = {names[i * (len(names) - 1) // (TENSORS - 1)] for i in range(TENSORS)}
    some.add(max(names, key=lambda name: inputs.out[name].numel()))
    for i, name in enumerate(names):
        if name in some:
            given = (inputs.base[name], [x[name] for x in inputs.models], inputs.out[name], before and before[i])
            base, models, out, old = (x if x is None else _flat(x) for x in given)
            _check_tensor(method, name, base, models, out, old, density)
    return f"{len(some)} of {len(names)} tensors are the oracle's"


def _flat(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return x.view(-1) if isinstance(x, Tensor) else [t.view(-1) for t in x]


def _check_tensor(method: str, name: str, base, models, out, before, density: float) -> int:
    n = out.numel()
    make = METHODS[method].spec
    spec = None if make is None else make(base, models, density)
    selection = select_by_counting(base, models, spec) if spec is not None and spec.sparsify == "magnitude" else None
    if n <= WHOLE:
        starts, length = [0], n
    else:
        starts, length = sorted({i * (n - PART) // (PARTS - 1) // 4096 * 4096 for i in range(PARTS)} | {n - PART}), PART
    for start in starts:
        part = slice(start, min(n, start + length))
        old = out[part] if before is None else before[part]
        want = oracle(method, base[part], [x[part] for x in models], old, spec, name, selection, start)
        _same(out[part], want, f"{method}{f', {name!r}' if name else ''}", start)
    return len(starts) * length


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _same(got: Tensor, want: Tensor, what: str, first: int) -> None:
    got, want = got.reshape(-1), want.reshape(-1)
    if not torch.equal(_bits(got), _bits(want)):
        wrong = (_bits(got) != _bits(want)).nonzero().view(-1)
        i = int(wrong[0])
        raise Wrong(
            f"{what} differs in {len(wrong)} of {got.numel()} elements, first at {first + i}: {got[i].item()!r}, not {want[i].item()!r}"
        )


def select_by_counting(base: Tensor, models: list[Tensor], spec: MergeSpec) -> Tensor:
    """Rows (key, cut) as :func:`pymerge.reference.select` has them, for ties kept from the first on: 16 bits of the key at a time, from the
    upper ones down, by counting how many magnitudes have which."""
    n = base.numel()
    wide = torch.float64 if torch.float64 in (base.dtype, *(x.dtype for x in models)) else torch.float32
    integers, width = (torch.int64, 64) if wide == torch.float64 else (torch.int32, 32)
    rows = []
    for x, k in zip(models, spec.counts(n)[0]):
        if k <= 0 or k >= n:
            rows.append((2**63 - 1, -1) if k <= 0 else (0, n - 1))
            continue

        def chunks(x: Tensor = x):
            for start in range(0, n, _CHUNK):
                part = slice(start, start + _CHUNK)
                yield start, (x[part].to(wide) - base[part].to(wide)).abs().view(integers)

        prefix, left = 0, k
        for shift in range(width - 16, -1, -16):
            counts = torch.zeros(2**16, dtype=torch.int64)
            for _, keys in chunks():
                inside = keys if shift == width - 16 else keys[(keys >> (shift + 16)) == prefix]
                counts += torch.bincount((inside >> shift) & 0xFFFF, minlength=2**16)
            from_above = counts.flip(0).cumsum(0)
            digit = 2**16 - 1 - int((from_above >= left).nonzero()[0])
            left -= int(from_above[2**16 - 2 - digit]) if digit < 2**16 - 1 else 0
            prefix = prefix << 16 | digit
        for start, keys in chunks():  # the left-th of those with the key is the last one kept
            equal = (keys == prefix).nonzero().view(-1)
            if left <= len(equal):
                rows.append((prefix, start + int(equal[left - 1])))
                break
            left -= len(equal)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def _verify_diagnosis(inputs: Inputs, density: float) -> str:
    """Sums and counts of the first elements are the oracle's; those of all are another instruction set's."""
    run = METHODS["diagnose"].run
    base, *models = (tensors(x)[0].view(-1)[:WHOLE] for x in (inputs.base, *inputs.models))
    part = Inputs(base, models, base, "one", inputs.dtype)
    want = new_statistics(len(models))
    bound = torch.tensor(1e-3).view(torch.int32).item()
    reference_diagnose.diagnose(base, models, torch.tensor([[bound, -1]] * len(models)), *want)
    for a, b in zip(run(part, density), want):
        _same(a, b, f"diagnose: statistics of the first {base.numel()} elements", 0)
    if len(native.available_isas()) == 1:
        return f"{base.numel()} elements' statistics are the oracle's"
    got = run(inputs, density)
    with _otherwise(torch.get_num_threads()) as isa:
        for a, b in zip(got, run(inputs, density)):
            _same(a, b, f"diagnose: {isa}'s statistics", 0)
    return f"{base.numel()} elements' statistics are the oracle's; all elements' {isa}'s"


# --------------------------------------------------------------------------------------------------------------------------------------
# Rivals


def agreement(got: Tensor, ours: Tensor) -> float:
    """Fraction of elements in which a rival's result is ours but for rounding: within 2 units in the last place of the output's dtype, and
    1e-5 (half types) or 1e-7 where terms cancel.

    Rivals that compute in bf16, or take other elements of those with the k-th magnitude, or add votes that cancel in another order, differ
    in a few elements for reasons of their own.
    """
    ulps = 2 * torch.finfo(ours.dtype).eps
    near = 1e-5 if ours.element_size() == 2 else 1e-7
    close, n = 0, ours.numel()
    got, ours = got.reshape(-1), ours.reshape(-1)
    for start in range(0, n, _CHUNK):
        a, b = (x[start : start + _CHUNK].double() for x in (got, ours))
        close += int(((a - b).abs() <= ulps * b.abs() + near).sum())
    return close / n


def slope(result: list[Tensor], base: list[Tensor], models: list[list[Tensor]]) -> float:
    """How much of the plain sum of deltas is in a merge, by least squares over all tensors: comparable between random drops that have
    nothing in common."""
    product = square = 0.0
    for i, merged in enumerate(result):
        whole = [x.reshape(-1) for x in (merged, base[i], *(model[i] for model in models))]
        for start in range(0, merged.numel(), _CHUNK):
            out, b, *xs = (x[start : start + _CHUNK].double() for x in whole)
            total = sum(x - b for x in xs)
            product += float((out - b) @ total)
            square += float(total @ total)
    return product / square
