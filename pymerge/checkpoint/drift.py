"""How far apart two checkpoints are: per tensor, per layer, per kind of tensor.

Every tensor is read once, in pieces of a few megabytes, so memory does not grow with the models. Sums are fp64 in a fixed order
(:func:`pymerge.ops.dots` for each piece of :data:`PIECE` elements, pieces in order): the same numbers for any number of threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from .. import ops
from . import dtypes
from .format import TensorInfo
from .groups import in_order, kind_of, layer_of
from .reader import open_checkpoint

__all__ = ["CheckpointDrift", "Drift", "diff"]

PIECE = 2**18
"""Elements that are compared at once: few enough for their fp32 copies to stay in the caches, many enough for Python's part to be small."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Drift:
    """The difference of a tensor of A from that of B, or of several taken as one long vector.

    Attributes:
        name: of the tensor, layer or kind.
        tensors: how many.
        elements: how many were compared; bytes for types of less than 8 bits.
        changed: elements that differ: in their bits where the dtypes are the same, in their values else.
        bytes: of the tensors in A.
        dtypes: safetensors codes in A and in B; of the first tensor.
        squares: sums of (a-b)^2, a^2, b^2 and a*b over the floating tensors.
        max_abs: largest |a - b| among them.
    """

    name: str
    tensors: int
    elements: int
    changed: int
    bytes: int
    dtypes: tuple[str, str]
    squares: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    max_abs: float = 0.0

    @property
    def relative(self) -> float:
        """||a - b|| / ||b||; infinite when only b is zero, NaN when a value is."""
        difference, _, b, _ = self.squares
        if b == 0:
            return 0.0 if difference == 0 else math.inf if difference > 0 else math.nan
        return math.sqrt(difference) / math.sqrt(b)

    @property
    def cosine(self) -> float:
        """Of the angle between a and b; 1 when they are equal, NaN when just one of them is zero."""
        difference, a, b, product = self.squares
        if difference == 0:
            return 1.0
        return max(-1.0, min(1.0, product / (math.sqrt(a) * math.sqrt(b)))) if a > 0 and b > 0 else math.nan

    @property
    def changed_fraction(self) -> float:
        """Of the elements."""
        return self.changed / self.elements if self.elements else 0.0

    def plus(self, other: Drift) -> Drift:
        """Both as one vector, under this one's name."""
        return replace(
            self,
            tensors=self.tensors + other.tensors,
            elements=self.elements + other.elements,
            changed=self.changed + other.changed,
            bytes=self.bytes + other.bytes,
            squares=tuple(x + y for x, y in zip(self.squares, other.squares, strict=True)),
            max_abs=_larger(self.max_abs, other.max_abs),
        )


@dataclass(frozen=True)
class CheckpointDrift:
    """Two checkpoints compared.

    Attributes:
        tensors: one per tensor that both have with the same shape, sorted by name with numbers as numbers.
        only_in_a, only_in_b: the tensors that one of them has.
        reshaped: (in A, in B) for tensors of different shape, which are not compared.
    """

    tensors: tuple[Drift, ...]
    only_in_a: tuple[TensorInfo, ...]
    only_in_b: tuple[TensorInfo, ...]
    reshaped: tuple[tuple[TensorInfo, TensorInfo], ...]

    @property
    def equal(self) -> bool:
        """The same tensors with the same shapes, dtypes and bits."""
        same = all(t.changed == 0 and t.dtypes[0] == t.dtypes[1] for t in self.tensors)
        return same and not (self.only_in_a or self.only_in_b or self.reshaped)

    @property
    def total(self) -> Drift:
        """All compared tensors as one vector."""
        return next(iter(_grouped(self.tensors, lambda _: "all").values()), Drift("all", 0, 0, 0, 0, ("", "")))

    def by_layer(self) -> tuple[Drift, ...]:
        """One per layer ("model.layers.3"), and one per module outside the layers."""
        return tuple(_grouped(self.tensors, layer_of).values())

    def by_kind(self) -> tuple[Drift, ...]:
        """One per kind of tensor, over all layers ("model.layers.*.mlp.up_proj.weight")."""
        return tuple(_grouped(self.tensors, kind_of).values())


def diff(a: str | os.PathLike, b: str | os.PathLike, *, progress: Callable[[int, int], None] | None = None) -> CheckpointDrift:
    """How far checkpoint `a` is from checkpoint `b`. Their dtypes may differ; differences are taken in fp32, in fp64 where one is fp64.

    Args:
        a, b: folders or files as :func:`pymerge.checkpoint.reader.open_checkpoint` takes them.
        progress: called as ``progress(bytes_done, bytes_total)``.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        common = [(info, second.tensors[name]) for name, info in first.tensors.items() if name in second.tensors]
        pairs = [(x, y) for x, y in common if x.shape == y.shape]
        found = _compare(first, second, pairs, progress)
        return CheckpointDrift(
            tuple(sorted(found, key=lambda d: in_order(d.name))),
            tuple(info for name, info in first.tensors.items() if name not in second.tensors),
            tuple(info for name, info in second.tensors.items() if name not in first.tensors),
            tuple((x, y) for x, y in common if x.shape != y.shape),
        )


# --------------------------------------------------------------------------------------------------------------------------------------
# Reading ahead


@dataclass(frozen=True)
class _Piece:
    pair: int
    start: int  # in elements
    stop: int


def _pieces(pairs: list[tuple[TensorInfo, TensorInfo]]) -> Iterator[_Piece]:
    for i, (info, _) in enumerate(pairs):
        for start in range(0, info.numel, PIECE):
            yield _Piece(i, start, min(start + PIECE, info.numel))


class _Buffers:
    """Memory for a piece of A and of B, filled by two reads in the background."""

    def __init__(self, stores, pairs, pool: ThreadPoolExecutor) -> None:
        self._stores, self._pairs, self._pool = stores, pairs, pool
        widest = max((dtypes.BITS[info.dtype] for pair in pairs for info in pair), default=8)
        self._memory = [bytearray(PIECE * widest // 8) for _ in range(2)]
        self._reads: list[Future] = []
        self.piece: _Piece | None = None

    def fill(self, piece: _Piece | None) -> None:
        self.piece, self._reads = piece, []
        if piece is not None:
            for side, store in enumerate(self._stores):
                info = self._pairs[piece.pair][side]
                start, stop = (n * dtypes.BITS[info.dtype] // 8 for n in (piece.start, piece.stop))
                target = memoryview(self._memory[side])[: stop - start]
                self._reads.append(self._pool.submit(store.read_into, info, target, start))

    def bytes(self) -> list[torch.Tensor]:
        for read in self._reads:
            read.result()
        sizes = [dtypes.BITS[info.dtype] * (self.piece.stop - self.piece.start) // 8 for info in self._pairs[self.piece.pair]]
        return [torch.frombuffer(memory, dtype=torch.uint8, count=size) for memory, size in zip(self._memory, sizes, strict=True)]


def _compare(first, second, pairs, progress) -> list[Drift]:
    found = [Drift(x.name, 1, _elements(x), 0, x.nbytes, (x.dtype, y.dtype)) for x, y in pairs]
    comparison = _Comparison()
    total, done = sum(x.nbytes + y.nbytes for x, y in pairs), 0
    with ThreadPoolExecutor(2, thread_name_prefix="pymerge-read") as pool:
        now, ahead = (_Buffers((first, second), pairs, pool) for _ in range(2))
        pieces = _pieces(pairs)
        now.fill(next(pieces, None))
        while now.piece is not None:
            ahead.fill(next(pieces, None))
            a, b = now.bytes()
            i = now.piece.pair
            changed, squares, max_abs = comparison.of(a, b, *found[i].dtypes)
            old = found[i]
            found[i] = replace(
                old,
                changed=old.changed + changed,
                squares=tuple(x + y for x, y in zip(old.squares, squares, strict=True)),
                max_abs=_larger(old.max_abs, max_abs),
            )
            done += len(a) + len(b)
            if progress is not None:
                progress(done, total)
            now, ahead = ahead, now
    return found


# --------------------------------------------------------------------------------------------------------------------------------------
# Comparing


def _elements(info: TensorInfo) -> int:
    return info.numel if dtypes.BITS[info.dtype] >= 8 else info.nbytes


class _Comparison:
    """Compares pieces, in memory that it keeps: fresh memory for every piece would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._scratch: dict[torch.dtype, list[torch.Tensor]] = {}

    def of(self, a: torch.Tensor, b: torch.Tensor, code_a: str, code_b: str) -> tuple[int, tuple[float, ...], float]:
        """(changed elements, the four sums, largest difference) of a piece's bytes."""
        nothing = (0.0, 0.0, 0.0, 0.0)
        changed = 0
        if code_a == code_b:
            integers = _INTEGERS[max(1, dtypes.BITS[code_a] // 8)]
            changed = int(torch.count_nonzero(a.view(integers) != b.view(integers)))
        if not (dtypes.is_merged(code_a) and dtypes.is_merged(code_b)):
            # An integer is not the number that the same bits are in another type.
            return (changed if code_a == code_b else len(a) * 8 // max(8, dtypes.BITS[code_a])), nothing, 0.0
        x, y = a.view(dtypes.torch_dtype(code_a)), b.view(dtypes.torch_dtype(code_b))
        aa, bb, ab = ops.dots(x, y).tolist()
        if code_a == code_b and not changed and math.isfinite(bb):
            return 0, (0.0, aa, bb, ab), 0.0
        wide_x, wide_y = self._wide(torch.float64 if "F64" in (code_a, code_b) else torch.float32, x, y)
        if code_a != code_b:
            changed = int(torch.count_nonzero(wide_x != wide_y))
        difference = wide_x.sub_(wide_y)
        low, high = difference.aminmax()
        return changed, (ops.dots(difference, difference)[0].item(), aa, bb, ab), _larger(-low.item(), high.item())

    def _wide(self, dtype: torch.dtype, *pieces: torch.Tensor) -> list[torch.Tensor]:
        if dtype not in self._scratch:
            self._scratch[dtype] = [torch.empty(PIECE, dtype=dtype) for _ in pieces]
        return [memory[: len(piece)].copy_(piece) for memory, piece in zip(self._scratch[dtype], pieces, strict=True)]


def _larger(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else max(x, y)


def _grouped(drifts: tuple[Drift, ...], group: Callable[[str], str]) -> dict[str, Drift]:
    groups: dict[str, Drift] = {}
    for drift in drifts:
        name = group(drift.name)
        groups[name] = groups[name].plus(drift) if name in groups else replace(drift, name=name)
    return groups
