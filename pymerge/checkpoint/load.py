"""One tensor of a store, in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dtypes
from .format import CheckpointError, TensorInfo
from .store import TensorStore

__all__ = ["load_tensor"]


def load_tensor(store: TensorStore, info: TensorInfo) -> Tensor:
    """A tensor of numbers (fp64 to fp8), on the CPU.

    Raises:
        CheckpointError: it is of integers, booleans or packed codes, or cannot be read.
    """
    if not dtypes.is_merged(info.dtype):
        raise CheckpointError(f"{info.file}: {info.name!r} is of dtype {info.dtype}; floating-point numbers are expected")
    data = bytearray(info.nbytes)
    store.read_into(info, memoryview(data))
    if not data:
        return torch.empty(info.shape, dtype=dtypes.torch_dtype(info.dtype))
    return torch.frombuffer(data, dtype=torch.uint8).view(dtypes.torch_dtype(info.dtype)).view(info.shape)
