"""A base with an adapter added to it, computed while it is read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import dtypes
from ..extras import read_config
from ..format import CheckpointError, TensorInfo
from ..load import load_tensor
from ..reader import check_range
from ..store import TensorStore
from .adapter import Adapter, LowRank, widened
from .place import find_shift, orientation
from .product import add_product

__all__ = ["AdaptedCheckpoint"]

FACTORS_KEPT = 4
"""Modules whose widened factors stay in memory: those of the tensors that are being read."""


@dataclass(frozen=True)
class _Change:
    """What is added to a tensor: a low-rank product, or a bias."""

    low_rank: LowRank
    transposed: bool = False
    bias: bool = False


class AdaptedCheckpoint:
    """The tensors of ``base + adapter``: a :class:`pymerge.checkpoint.store.TensorStore`.

    A tensor that the adapter changes is ``base + scale * B @ A``, computed in fp32 (fp64 if any of the three is fp64) for the bytes that
    are asked for and rounded once to the base's dtype; the same bits whatever pieces are read (see :mod:`.product`). Nothing is held but
    the factors of the modules that are being read.

    Args:
        store: the base.
        adapter: trained on it; see :func:`open_adapter`. Both are closed with this.

    Attributes:
        warnings: what differs from the model as PEFT runs it.

    Raises:
        CheckpointError: the adapter does not fit the base.
    """

    def __init__(self, store: TensorStore, adapter: Adapter) -> None:
        self.base = store
        self.adapter = adapter
        self.path: Path = store.path.with_name(f"{store.path.name}+{adapter.path.name}")
        self.folder = store.folder
        self.files = tuple(dict.fromkeys((*store.files, *adapter.files)))
        self.headers = [*getattr(store, "headers", ()), *adapter.store.headers]
        self.tensors: dict[str, TensorInfo] = dict(store.tensors)
        self.warnings: list[str] = list(getattr(store, "warnings", ()))
        self._replaced: dict[str, TensorInfo] = {}
        self._changes: dict[str, _Change] = {}
        self._factors: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self._place()
        self.nbytes = sum(info.nbytes for info in self.tensors.values())
        touched = self._replaced.keys() | self._changes.keys()
        self.aliases = {a: b for a, b in getattr(store, "aliases", {}).items() if a not in touched and b not in touched}

    def _place(self) -> None:
        """Find the tensors that the adapter replaces or changes."""
        base, adapter = str(self.base.path), self.adapter
        config = read_config(self.folder) or {}
        tied = bool(config.get("tie_word_embeddings"))
        self._check_tied_head(tied)
        shift = find_shift(adapter, self.base.tensors.keys() | adapter.replaced.keys(), base)
        for name, info in adapter.replaced.items():
            # A head that was trained with the adapter may be new to the base; everything else has its place there.
            shifted = shift(name)
            self._replace(name if shifted is None or (name in self.base.tensors or shifted not in self.base.tensors) else shifted, info)
        weights = {module: self.tensors[shift(f"{module}.weight")] for module in adapter.modules}
        transposed = orientation(adapter, weights, base)
        for module, change in adapter.modules.items():
            self._change(weights[module], _Change(change, transposed[module]))
            if change.bias is not None:
                bias = self.tensors.get(shift(f"{module}.bias"))
                if bias is None or bias.shape != change.bias.shape:
                    raise CheckpointError(f"{adapter.path}: adds to the bias of {module!r} (lora_bias), and {base} has none of its shape")
                self._change(bias, _Change(change, bias=True))
            if tied and change.kind == "embedding":
                self.warnings.append(
                    f"{self.path}: the embedding {weights[module].name!r} is the output head too (tie_word_embeddings): the adapter was "
                    "trained on the embedding alone, and merged it changes both, as PEFT's merge_and_unload does"
                )

    def _check_tied_head(self, tied: bool) -> None:
        """A model whose head is its embedding has no head to change."""
        for name in (*(f"{module}.weight" for module in self.adapter.modules), *self.adapter.replaced) if tied else ():
            if name.endswith("lm_head.weight"):
                raise CheckpointError(
                    f"{self.adapter.path}: changes {name!r}, which is the input embedding in {self.base.path} (tie_word_embeddings in its "
                    "config.json). Save the base with a head of its own and tie_word_embeddings: false first"
                )

    def _replace(self, name: str, info: TensorInfo) -> None:
        self.tensors[name] = replace(info, name=name)
        self._replaced[name] = info

    def _change(self, weight: TensorInfo, change: _Change) -> None:
        if not dtypes.is_merged(weight.dtype):
            raise CheckpointError(
                f"{self.adapter.path}: {weight.name!r} of {self.base.path} is of dtype {weight.dtype}: nothing can be added to quantised "
                "weights; use the base that is not quantised"
            )
        if weight.name in self._changes:
            raise CheckpointError(f"{self.adapter.path}: changes {weight.name!r} twice")
        self._changes[weight.name] = change

    def read_into(self, info: TensorInfo, target: memoryview, start: int = 0) -> None:
        """Fill `target` with the bytes of a tensor from its byte `start` on. Safe to call from several threads.

        Raises:
            CheckpointError: the bytes of the base or of the adapter cannot be had.
        """
        check_range(info, target, start)
        change = self._changes.get(info.name)
        if change is None or not len(target):
            self._read_unchanged(info.name, target, start)
            return
        dtype = dtypes.torch_dtype(info.dtype)
        first, last = start // dtype.itemsize, -(-(start + len(target)) // dtype.itemsize)
        whole = (last - first) * dtype.itemsize == len(target)
        piece = target if whole else memoryview(bytearray((last - first) * dtype.itemsize))
        self._read_unchanged(info.name, piece, first * dtype.itemsize)
        x = torch.frombuffer(piece, dtype=torch.uint8).view(dtype)
        left, right = self._factors_of(info.name, change, dtype)
        add_product(x, first, left, right, change.low_rank.scale)
        if not whole:
            target[:] = piece[start - first * dtype.itemsize :][: len(target)]

    def _read_unchanged(self, name: str, target: memoryview, start: int) -> None:
        if name in self._replaced:
            self.adapter.store.read_into(self._replaced[name], target, start)
        else:
            self.base.read_into(self.base.tensors[name], target, start)

    def _factors_of(self, name: str, change: _Change, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The product's left (rows x rank) and right (rank x columns) factor, in the dtype to compute in."""
        with self._lock:
            if name not in self._factors:
                self._factors[name] = self._load_factors(change, dtype)
                if len(self._factors) > FACTORS_KEPT:
                    self._factors.popitem(last=False)
            self._factors.move_to_end(name)
            return self._factors[name]

    def _load_factors(self, change: _Change, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if change.bias:
            b = load_tensor(self.adapter.store, change.low_rank.bias).view(-1, 1)
            a = torch.ones(1, 1, dtype=b.dtype)
        else:
            b, a = self.adapter.factors(change.low_rank)
        left, right, _ = widened(*((a.t(), b.t()) if change.transposed else (b, a)), torch.empty(0, dtype=dtype))
        return left.contiguous(), right.contiguous()

    def close(self) -> None:
        """Close base and adapter. Reading opens them again."""
        self.base.close()
        self.adapter.close()
        with self._lock:
            self._factors.clear()

    def __enter__(self) -> AdaptedCheckpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()
