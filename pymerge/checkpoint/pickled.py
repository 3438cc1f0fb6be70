"""PyTorch's own files (.bin, .pt, .pth), opened for reading like safetensors files and never executed.

``torch.load(weights_only=True)`` builds nothing but tensors and plain containers. It is called with the meta device, which gives names,
shapes, strides and the place of every storage in the file; the bytes are then read as those of a safetensors file are, with preadv. So
nothing is mapped (a file that is cut short under a memory map kills the process), and planning reads no data. What torch cannot place,
files in its format before 1.6, is loaded whole at the first read.
"""

from __future__ import annotations

import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dtypes import BITS, NAMES
from .format import MAX_DIMENSIONS, CheckpointError, Header, TensorInfo, identity_of, open_regular
from .reader import Checkpoint, check_range
from .strided import is_contiguous, read_strided

__all__ = ["PickledCheckpoint"]

CODES = {getattr(torch, name): code for code, name in NAMES.items() if hasattr(torch, name)} | {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
}  # fmt: skip
"""The safetensors codes of torch's dtypes."""


@dataclass(frozen=True)
class _View:
    """How a tensor lies in its storage.

    Attributes:
        strides: in elements.
        offset: of the first element, in bytes: in the file, or in the storage when the file is loaded whole.
        key: two tensors of one file with the same key are the same memory.
    """

    strides: tuple[int, ...]
    offset: int
    key: tuple


@dataclass(frozen=True)
class _Content:
    """What a file holds.

    Attributes:
        views: by name of tensor.
        ignored: names of what is no tensor.
        placed: whether it is known where the data lies in the file; if not, the file is loaded whole.
    """

    header: Header
    views: dict[str, _View]
    ignored: list[str]
    placed: bool


class PickledCheckpoint(Checkpoint):
    """The tensors of one checkpoint in PyTorch's format; opened by :func:`pymerge.checkpoint.reader.open_checkpoint`.

    Attributes:
        ignored: names of entries beside the tensors that are no tensors, such as a step count.

    The others are those of :class:`Checkpoint`; tensors that are one piece of memory are listed under all their names, and ``aliases``
    has the later ones.
    """

    def __init__(self, path: Path, folder: Path | None, index: Path | None, files: tuple[Path, ...]) -> None:
        found = [_read_file(file) for file in files]
        super().__init__(path, folder, index, [content.header for content in found])
        self.ignored = tuple(name for content in found for name in content.ignored)
        self._views = {name: view for content in found for name, view in content.views.items()}
        self._whole = frozenset(content.header.file for content in found if not content.placed)
        self._resident: dict[Path, dict[str, Tensor]] = {}
        self._loading = threading.Lock()
        first: dict[tuple, str] = {}
        self.aliases = {}
        for name, info in self.tensors.items():
            kept = first.setdefault((info.file, info.dtype, info.shape, *self._views[name].key), name)
            if kept != name and info.nbytes:
                self.aliases[name] = kept

    def read_into(self, info: TensorInfo, target: memoryview, start: int = 0) -> None:
        """As :meth:`Checkpoint.read_into`; a tensor that is not contiguous is brought into order."""
        view = self._views[info.name]
        if info.file in self._whole:
            check_range(info, target, start)
            tensor = self._load(info.file)[info.name]
            storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())

            def read(position: int, piece: memoryview) -> None:
                torch.frombuffer(piece, dtype=torch.uint8).copy_(storage[position : position + len(piece)])
        elif is_contiguous(info.shape, view.strides):
            super().read_into(info, target, start)
            return
        else:
            check_range(info, target, start)

            def read(position: int, piece: memoryview) -> None:
                self._read_at(info, position, piece)

        if len(target):
            read_strided(read, info.shape, view.strides, view.offset, BITS[info.dtype] // 8, start, target)

    def close(self) -> None:
        """Close the files and forget what was loaded. Reading opens and loads them again."""
        super().close()
        with self._loading:
            self._resident.clear()

    def _load(self, file: Path) -> dict[str, Tensor]:
        with self._loading:
            if file not in self._resident:
                self._release(self._acquire(file))  # raises if the file has changed
                content = _torch_load(file, map_location="cpu", mmap=_is_zip(file))
                self._resident[file] = dict(_state_dict(content, file)[0])
            return self._resident[file]


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _torch_load(file: Path, **options) -> Any:
    """torch.load without code execution; everything that it refuses is a CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols and TorchScript; what matters is an error
            return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: holds more than tensors, and running what is in it is not safe: {_reason(error)}. If you trust the file, save its "
            "weights alone: torch.save(model.state_dict(), ...), or better with safetensors.torch.save_file"
        ) from None
    except MemoryError:
        raise CheckpointError(f"{file}: there is not enough memory to load it") from None
    except Exception as error:  # a damaged pickle can fail in any way: KeyError, IndexError, struct.error, EOFError, AssertionError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: is truncated, damaged or not a PyTorch file: {reason[:200]}") from None


def _reason(error: Exception) -> str:
    """What was refused, from torch's long message."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    if name:
        return f"it uses {name.group(1)[:200]}"
    return " ".join(str(error).partition("WeightsUnpickler error: ")[2].split())[:200] or "torch.load(weights_only=True) refuses it"


def _read_file(file: Path) -> _Content:
    """Names, shapes and places of a file's tensors, and the names of what is ignored. No data is read, but see the module."""
    fd, stat = open_regular(file)
    with open(fd, "rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
        records = _records(opened, file) if is_zip else None
    placed = is_zip
    if is_zip:
        tensors, ignored = _state_dict(_torch_load(file, map_location="meta", mmap=True), file)
        # older versions of torch do not tell where a storage lies.
        placed = all(getattr(t.untyped_storage(), "_checkpoint_offset", None) is not None for t in tensors.values())
    if not placed:
        with _without_data(is_zip):
            tensors, ignored = _state_dict(_torch_load(file, map_location="cpu", mmap=is_zip), file)
    infos: dict[str, TensorInfo] = {}
    views: dict[str, _View] = {}
    for name, tensor in tensors.items():
        code = _check_tensor(name, tensor, file, stat.st_size)
        size = BITS[code] // 8
        origin = tensor.untyped_storage()._checkpoint_offset if placed else 0
        begin = tensor.storage_offset() * size
        if placed:
            _check_place(name, tensor, begin, origin, records, file)
        views[name] = _View(
            tensor.stride(), origin + begin, (origin if placed else tensor.untyped_storage()._cdata, begin, tensor.stride())
        )
        infos[name] = TensorInfo(name, code, tuple(tensor.shape), file, origin + begin, tensor.numel() * size)
    if placed:
        infos = dict(sorted(infos.items(), key=lambda item: item[1].offset))
    return _Content(Header(file, stat.st_size, 0, {}, infos, identity_of(stat)), views, ignored, placed)


@contextmanager
def _without_data(is_zip: bool) -> Iterator[None]:
    if is_zip:
        yield
    else:
        with torch.serialization.skip_data():  # reserves memory without touching it
            yield


def _records(opened, file: Path) -> dict[int, int]:
    """Position of a record's data -> its size, for every record of a zip file, which must all be stored as they are."""
    try:
        archive = zipfile.ZipFile(opened)
        entries = archive.infolist()
        found = {}
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(f"{file}: is a TorchScript archive, which is a program; save the module's state_dict() instead")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{file}: record {entry.filename!r} is compressed or encrypted; PyTorch never does that")
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise CheckpointError(f"{file}: was written on a big-endian machine; load and save it again with PyTorch")
            opened.seek(entry.header_offset + 26)  # two lengths at the end of the local header, whose extra field is not the directory's
            lengths = opened.read(4)
            begin = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            found[begin] = entry.file_size
        return found
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises BadZipFile, struct.error, NotImplementedError, EOFError, ... on damaged files
        raise CheckpointError(f"{file}: is truncated, damaged or not a PyTorch file: {error}") from None


def _check_plain(name: str, tensor: Tensor, file: Path) -> None:
    """Only dense tensors have a storage to look at."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or tensor.is_nested:
        kind = str(tensor.layout).removeprefix("torch.") if type(tensor) is Tensor else type(tensor).__name__
        raise CheckpointError(f"{file}: tensor {name!r}: is a {kind} tensor; only dense tensors can be merged")


def _check_tensor(name: str, tensor: Tensor, file: Path, file_size: int) -> str:
    """The code of a tensor's dtype, if it is a plain tensor of a size that the file can hold."""
    where = f"{file}: tensor {name!r}"
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: its name is not Unicode text") from None
    if tensor.is_quantized or tensor.dtype not in CODES:
        raise CheckpointError(f"{where}: dtype {tensor.dtype} cannot be merged or copied" + "; dequantise it first" * tensor.is_quantized)
    if tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"{where}: is a lazy conjugate or negative; save it with resolve_conj().resolve_neg()")
    code = CODES[tensor.dtype]
    if tensor.dim() > MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: has {tensor.dim()} dimensions; at most {MAX_DIMENSIONS} are possible")
    if tensor.numel() * BITS[code] // 8 > file_size:
        raise CheckpointError(f"{where}: shape {list(tensor.shape)} of {code} is larger than the whole file of {file_size} bytes")
    return code


def _check_place(name: str, tensor: Tensor, begin: int, origin: int, records: Mapping[int, int] | None, file: Path) -> None:
    """The tensor must lie inside a record; torch does not check that for the meta device."""
    if not tensor.numel():
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    end = begin + (last + 1) * tensor.element_size()
    if records is None or origin not in records or begin < 0 or min(tensor.stride(), default=0) < 0 or end > records[origin]:
        raise CheckpointError(f"{file}: truncated or damaged: tensor {name!r} does not lie inside the data that the file has for it")


def _state_dict(content: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, from the top of a file or from the one mapping in it that has some, and the names of what is no tensor."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}; a mapping of names to tensors, a state_dict, is expected")
    if not _has_tensors(content):
        inner = [key for key, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
        if len(inner) > 1:
            raise CheckpointError(
                f"{file}: holds tensors under each of {', '.join(map(repr, inner))}, and it is not clear which are the model; "
                "save the one you mean in a file of its own"
            )
        if not inner:
            raise CheckpointError(f"{file}: holds no tensors by name")
        content = content[inner[0]]
    tensors: dict[str, Tensor] = {}
    ignored: list[str] = []
    for key, value in content.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            _check_plain(key, value, file)
            tensors[key] = value
        elif isinstance(value, Tensor) or (isinstance(value, Mapping) and _has_tensors(value)):
            raise CheckpointError(f"{file}: entry {key!r} is not a tensor with a name beside others that are; save a flat state_dict")
        else:
            ignored.append(str(key))
    return tensors, ignored


def _has_tensors(mapping: Mapping) -> bool:
    return any(isinstance(key, str) and isinstance(value, Tensor) for key, value in mapping.items())
