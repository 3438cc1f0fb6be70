"""Models to compare: tensors, mappings and modules in memory, checkpoints on disk, under one roof."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.format import TensorInfo
from ..checkpoint.reader import Checkpoint, open_checkpoint
from ..checkpoint.store import TensorStore
from ..tree import Source

__all__ = ["Common", "Model", "common_tensors", "named", "open_model", "stored_model"]


@dataclass
class Model:
    """One model: what its tensors are, and how parts of them are read.

    Attributes:
        label: what to call it.
        shapes: of its floating tensors, by name.
        tied: names of tensors that repeat another one.
    """

    label: str
    shapes: dict[str, tuple[int, ...]]
    tied: frozenset[str]
    _store: TensorStore | None = None
    _infos: Mapping[str, TensorInfo] = field(default_factory=dict)
    _source: Source | None = None

    def dtype(self, name: str) -> torch.dtype:
        """Storage dtype."""
        if self._store is not None:
            return dtypes.torch_dtype(self._infos[name].dtype)
        return self._source[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in memory."""
        return self.part(name, 0, torch.Size(self.shapes[name]).numel()).reshape(self.shapes[name])

    def part(self, name: str, start: int, count: int, buffer: bytearray | None = None) -> Tensor:
        """`count` elements from element `start` on, flat; those of a file are read into `buffer`, which is made if there is none."""
        if self._store is None:
            return self._source[name].reshape(-1)[start : start + count]
        info, dtype = self._infos[name], self.dtype(name)
        if count == 0:
            return torch.empty(0, dtype=dtype)
        buffer = bytearray(count * dtype.itemsize) if buffer is None else buffer
        view = memoryview(buffer)[: count * dtype.itemsize]
        self._store.read_into(info, view, start * dtype.itemsize)
        return torch.frombuffer(view, dtype=dtype)

    def parts(self, name: str, starts: Sequence[int], length: int) -> Tensor:
        """The parts of `length` elements from each of `starts` on, one after the other."""
        if self._store is None:
            found = [self.part(name, start, length) for start in starts]
            return torch.cat(found) if len(found) > 1 else found[0]
        info, dtype = self._infos[name], self.dtype(name)
        size = length * dtype.itemsize
        view = memoryview(bytearray(len(starts) * size))
        pieces = [(start * dtype.itemsize, view[i * size : (i + 1) * size]) for i, start in enumerate(starts)]
        with self.place(name) or nullcontext() as place:
            for start, piece in pieces:
                # Finding the file anew would cost as much as reading so little. Where that fails, the store says what is wrong.
                if place is None or not _fill(piece, place[0], place[1] + start):
                    self._store.read_into(info, piece, start)
        return torch.frombuffer(view, dtype=dtype)

    def place(self, name: str) -> AbstractContextManager[tuple[int, int]] | None:
        """:meth:`Checkpoint.place` of a tensor whose bytes lie in a file as they are; None where they are made or brought into order."""
        return self._store.place(self._infos[name]) if type(self._store) is Checkpoint else None

    @property
    def in_memory(self) -> bool:
        """Whether reading it costs nothing."""
        return self._store is None

    def close(self) -> None:
        """Close its files, if any."""
        if self._store is not None:
            self._store.close()


def _fill(target: memoryview, file: int, position: int) -> bool:
    """Whether a file has enough bytes from a position on and gave them at once."""
    try:
        return os.preadv(file, [target], position) == len(target)
    except OSError:
        return False


def open_model(model: Any, label: str) -> Model:
    """A tensor, mapping, module, :class:`Checkpoint` or the path of a checkpoint as a :class:`Model`.

    Raises:
        CheckpointError: a path is no checkpoint.
        TypeError: it is none of these.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, (str, os.PathLike)):
        model = open_checkpoint(model)
    if isinstance(model, Checkpoint):
        return stored_model(model, model.tensors, label)
    source = Source(model, label)
    facts, tied = source.survey()
    for name, fact in facts.items():
        if fact.trouble:
            raise TypeError(f"{label}: {name!r} {fact.trouble}")
    shapes = {name: tuple(fact.shape) for name, fact in facts.items() if fact.dtype.is_floating_point}
    return Model(label, shapes, frozenset(n for n in shapes if n in tied), _source=source)


def stored_model(store: TensorStore, infos: Mapping[str, TensorInfo], label: str) -> Model:
    """The given tensors of a store, under any names, as one model."""
    infos = {name: info for name, info in infos.items() if dtypes.is_merged(info.dtype)}
    return Model(label, {name: info.shape for name, info in infos.items()}, frozenset(), _store=store, _infos=infos)


def named(models: Any) -> dict[str, Any]:
    """Models by name: a mapping name -> model as it is, a list by position, paths by their last part where that tells them apart."""
    if isinstance(models, Mapping) and not any(isinstance(v, Tensor) for v in models.values()):
        found = dict(models)
    elif isinstance(models, Sequence) and not isinstance(models, str):
        names = [os.path.basename(os.path.normpath(m)) if isinstance(m, (str, os.PathLike)) else f"model {i}" for i, m in enumerate(models)]
        names = names if len(set(names)) == len(names) else [f"model {i}" for i in range(len(models))]
        found = dict(zip(names, models))
    else:
        raise TypeError(f"the models are one {type(models).__name__}; pass a list of models, or a mapping name -> model")
    if not found:
        raise ValueError("no models given")
    return found


@dataclass(frozen=True)
class Common:
    """Names that all models have with one shape, tied ones once, and what is wrong with the others."""

    names: tuple[str, ...]
    problems: tuple[str, ...]


def common_tensors(models: Sequence[Model]) -> Common:
    """What can be compared; raises nothing."""
    first, *others = models
    names, problems = [], []
    for name, shape in first.shapes.items():
        lacking = [m.label for m in others if name not in m.shapes]
        different = [f"{list(m.shapes[name])} in {m.label}" for m in others if name in m.shapes and m.shapes[name] != shape]
        if lacking:
            problems.append(f"{name!r} is not in {', '.join(lacking)}")
        elif different:
            problems.append(f"{name!r} is {list(shape)} in {first.label} and {', '.join(different)}")
        elif not all(name in m.tied for m in models):
            names.append(name)
    for m in others:
        problems += [f"{name!r} of {m.label} is not in {first.label}" for name in m.shapes if name not in first.shapes]
    return Common(tuple(names), tuple(problems))
