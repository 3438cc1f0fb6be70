"""Pieces of a strided tensor in row-major order, without reading the whole of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["StridedRead", "is_contiguous", "read_strided"]

StridedRead = Callable[[int, memoryview], None]
"""``read(position, target)`` fills `target` with the bytes from `position` of the storage on."""

SMALLEST_SPAN = 2**20
"""Bytes that are read in one go even when only few of them are wanted: a system call costs as much as copying some 10 kB."""


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie in row-major order without gaps. Strides are in elements."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def read_strided(
    read: StridedRead, shape: Sequence[int], strides: Sequence[int], offset: int, itemsize: int, start: int, target: memoryview
) -> None:
    """Fill `target` with the row-major bytes of a strided tensor from its byte `start` on.

    Args:
        read: gives bytes of the storage.
        shape, strides: of the tensor, in elements.
        offset: of its first element in the storage, in bytes.
        itemsize: bytes of an element.
        start: first byte wanted, counted in the row-major tensor.
        target: as long as the piece that is wanted.
    """
    first, last = start // itemsize, -(-(start + len(target)) // itemsize)
    if (last - first) * itemsize == len(target):
        _range(read, shape, strides, offset, itemsize, first, _elements(target, itemsize))
        return
    whole = bytearray((last - first) * itemsize)  # the piece begins or ends inside an element
    _range(read, shape, strides, offset, itemsize, first, _elements(memoryview(whole), itemsize))
    target[:] = memoryview(whole)[start - first * itemsize :][: len(target)]


def _elements(memory: memoryview, itemsize: int) -> Tensor:
    """`memory` as rows of bytes, one per element."""
    if not len(memory):
        return torch.empty((0, itemsize), dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8).view(-1, itemsize)


def _range(read: StridedRead, shape: Sequence[int], strides: Sequence[int], offset: int, itemsize: int, first: int, out: Tensor) -> None:
    """Elements from `first` on, as many as `out` has: the end of one row, whole rows, the beginning of another."""
    count = len(out)
    if not count:
        return
    if not shape:
        _box(read, (), offset, itemsize, out[0])
        return
    row, inner, step = math.prod(shape[1:]), shape[1:], strides[0] * itemsize
    index, inside = divmod(first, row)
    if inside or count < row:
        head = min(count, row - inside)
        _range(read, inner, strides[1:], offset + index * step, itemsize, inside, out[:head])
        _range(read, shape, strides, offset, itemsize, first + head, out[head:])
        return
    rows = count // row
    _box(read, strides, offset + index * step, itemsize, out[: rows * row].view(rows, *inner, itemsize))
    _range(read, shape, strides, offset, itemsize, first + rows * row, out[rows * row :])


def _box(read: StridedRead, strides: Sequence[int], offset: int, itemsize: int, out: Tensor) -> None:
    """A whole strided tensor into `out` (its shape and the bytes of an element), in as few reads as waste no memory: a transposed matrix
    is cut along its columns."""
    shape = out.shape[:-1]
    if not out.numel():
        return
    span = (sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1) * itemsize
    if span > max(SMALLEST_SPAN, 2 * out.numel()):
        # More than an element is wanted of a span with gaps, so some dimension of more than one element has the widest stride.
        widest = max((i for i, size in enumerate(shape) if size > 1), key=lambda i: strides[i])
        half = shape[widest] // 2
        for begin, size in ((0, half), (half, shape[widest] - half)):
            _box(read, strides, offset + begin * strides[widest] * itemsize, itemsize, out.narrow(widest, begin, size))
        return
    piece = bytearray(span)
    read(offset, memoryview(piece))
    view = torch.frombuffer(piece, dtype=torch.uint8)
    out.copy_(view.as_strided(out.shape, (*(stride * itemsize for stride in strides), 1)))
