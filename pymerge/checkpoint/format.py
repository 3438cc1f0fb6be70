"""Strict reading of safetensors headers.

A file is: the header's length (8 bytes, little endian), the header (JSON, padded with spaces), the data. The header maps names to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the start of the data. Whatever a header says is checked before
anything is believed: a malformed file ends in a :class:`CheckpointError` that names the file, the tensor and the values.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dtypes import BITS

__all__ = [
    "MAX_HEADER_BYTES", "CheckpointError", "Header", "InputChangedError", "TensorInfo", "load_json", "open_regular", "parse_header",
    "read_header",
]  # fmt: skip

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_BITS = 2**63 - 1


class CheckpointError(ValueError):
    """A checkpoint on disk cannot be used. The message names the file and what is wrong with it."""


class InputChangedError(CheckpointError):
    """A checkpoint is no longer what it was when the merge began."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its key in the header.
        dtype: safetensors code, "BF16".
        shape: its dimensions.
        file: the file that holds it.
        offset: of its first byte, from the start of the file.
        nbytes: its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
        file: the file.
        size: of the file, in bytes.
        data_start: where the data begins, in bytes from the start of the file.
        metadata: the ``__metadata__`` strings.
        tensors: in the order of their data.
        identity: device, inode, size and mtime of the file that was read, to notice that it was replaced later.
    """

    file: Path
    size: int
    data_start: int
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    identity: tuple[int, int, int, int]


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """Open a regular file for reading: (descriptor, its stat). O_NONBLOCK keeps a named pipe from hanging the open."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: is not a regular file; name a .safetensors file or a folder with a checkpoint")
    return fd, info


def identity_of(info: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one state of one file from another."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read or is malformed.
    """
    fd, info = open_regular(path)
    try:
        size = info.st_size
        if size < 8:
            raise CheckpointError(
                f"{path}: is {size} bytes long; a safetensors file begins with 8 bytes that hold its header's length; download it again"
            )
        length = int.from_bytes(_read_exactly(fd, 8, 0, path), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: header of {length} bytes announced, more than the {MAX_HEADER_BYTES} allowed; this is not a safetensors file, "
                "or it is damaged: check what it is, or download it again"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: truncated: header of {length} bytes announced, but the file has {size} bytes in all; copy or download it again"
            )
        try:
            tensors, metadata = parse_header(_read_exactly(fd, length, 8, path), size, path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; copy or download the file again") from None
        return Header(path, size, 8 + length, metadata, tensors, identity_of(info))
    finally:
        os.close(fd)


def _read_exactly(fd: int, count: int, offset: int, path: Path) -> bytes:
    pieces = []
    while count:
        try:
            piece = os.pread(fd, count, offset)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        if not piece:
            raise CheckpointError(f"{path}: ends at byte {offset} while being read")
        pieces.append(piece)
        offset, count = offset + len(piece), count - len(piece)
    return b"".join(pieces)


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(f"key {key!r} occurs twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def load_json(raw: bytes, what: str) -> Any:
    """Parse JSON strictly: UTF-8, no key twice, no NaN or Infinity.

    Raises:
        CheckpointError: it is not JSON; `what` begins the message.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deep") from None
    except _DuplicateKey as error:
        raise CheckpointError(f"{what}: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None


def parse_header(raw: bytes, file_size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in the order of their data) and metadata of a header, every value checked against the others and the file's size.

    Raises:
        CheckpointError: the header is malformed.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: header does not begin with '{{'; this is not a safetensors file, or it is damaged")
    header = load_json(raw, f"{path}: header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    start = 8 + len(raw)
    tensors = sorted((_tensor(name, entry, start, path) for name, entry in header.items()), key=lambda t: (t.offset, t.nbytes))
    _check_coverage(tensors, start, file_size, path)
    return {t.name: t for t in tensors}, metadata


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(name: str, entry: Any, start: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    try:
        name.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no file can hold again
        raise CheckpointError(f"{where}: its name is not Unicode text") from None
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: is not described by a JSON object")
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: has keys {sorted(entry)}; 'dtype', 'shape' and 'data_offsets' are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: dtype {_short(dtype)} is unknown")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{where}: shape {_short(shape)} is not a list of non-negative integers")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{where}: data_offsets {_short(offsets)} are not two non-negative integers")
    begin, end = offsets
    # A zero dimension makes the product zero, but strides are products of the others, which must not overflow either.
    if math.prod(n for n in shape if n) * BITS[dtype] > MAX_BITS:
        raise CheckpointError(f"{where}: shape {_short(shape)} is too large for any memory")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8:
        raise CheckpointError(f"{where}: shape {_short(shape)} of {dtype} is not a whole number of bytes")
    if end < begin:
        raise CheckpointError(f"{where}: data_offsets {_short(offsets)} end before they begin")
    if end - begin != bits // 8:
        raise CheckpointError(
            f"{where}: data_offsets {_short(offsets)} span {_short(end - begin)} bytes, but shape {_short(shape)} of {dtype} is {bits // 8}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, bits // 8)


def _check_coverage(tensors: list[TensorInfo], start: int, file_size: int, path: Path) -> None:
    """Tensors must fill the data from its first to its last byte, one after the other."""
    position, previous = start, ""
    for t in tensors:
        if t.offset + t.nbytes > file_size:
            raise CheckpointError(
                f"{path}: truncated or damaged: tensor {t.name!r} ends at byte {_short(t.offset + t.nbytes)}, but the file has {file_size}"
            )
        if t.offset < position:
            raise CheckpointError(f"{path}: tensors {previous!r} and {t.name!r} overlap")
        if t.offset > position:
            raise CheckpointError(f"{path}: {t.offset - position} bytes before tensor {t.name!r} belong to no tensor")
        position, previous = t.offset + t.nbytes, t.name
    if position != file_size:
        raise CheckpointError(f"{path}: {file_size - position} bytes at the end belong to no tensor")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4300 digits has no decimal text
        return "(a number of thousands of digits)"
    return text if len(text) <= 80 else text[:77] + "..."
