"""PyTorch's files, made invalid or hostile: their zip archive, the pickle in it, and the format before that."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from tests.checkpoint.files import tensors_of

from .mutate import damaged

SOURCES = ("flat", "nested", "odd", "legacy")

GLOBALS = (
    "os\nsystem", "posix\nsystem", "builtins\neval", "builtins\ngetattr", "subprocess\nPopen", "torch\nload", "torch.hub\nload",
    "torch.storage\n_load_from_bytes", "torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_sparse_tensor",
    "torch._utils\n_rebuild_parameter", "torch._utils\n_rebuild_qtensor", "torch._utils\n_rebuild_meta_tensor_no_storage",
    "torch._utils\n_rebuild_nested_tensor", "torch\nFloatStorage", "torch\nDoubleStorage", "torch\nBFloat16Storage", "torch\nSize",
    "torch.nn.modules.linear\nLinear", "collections\nOrderedDict", "collections\nCounter", "numpy._core.multiarray\n_reconstruct",
    "a\nb", "\n",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 255, 2**16, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63), 2**64, 10**30)
TEXTS = ("", "cpu", "meta", "cuda:0", "cuda", "xla", "0", "1", "../0", "/etc/passwd", "storage", "module", "\ud800", "x" * 5000, "w")


def prepare(folder: Path) -> None:
    """Valid files of every kind."""
    folder = folder / "pickles"
    folder.mkdir()
    tensors = tensors_of(0, layers=1)
    one = torch.arange(60.0)
    odd = {
        "t": one.view(6, 10).t(), "part": one[7:19], "tied": one, "also": one, "expanded": one[:1].expand(9), "empty": torch.empty(0, 3),
        "half": one.half(), "bf16": one.bfloat16(), "f8": one.to(torch.float8_e4m3fn), "ids": torch.arange(9),
        "yes": torch.ones(3, dtype=torch.bool), "parameter": torch.nn.Parameter(one), "scalar": torch.tensor(2.0), "step": 3,
    }  # fmt: skip
    torch.save(tensors, folder / "flat.bin")
    torch.save({"state_dict": tensors, "epoch": 3, "args": {"lr": 0.1}}, folder / "nested.bin")
    torch.save(odd, folder / "odd.bin")
    torch.save(tensors, folder / "legacy.bin", _use_new_zipfile_serialization=False)


def pickled(folder: Path, rng: Random) -> tuple[Callable[[], object], int]:
    """One .bin file."""
    from .targets import read_everything

    path = folder / "work" / f"x{rng.choice(('.bin', '.pt', '.pth'))}"
    source = (folder / "pickles" / f"{rng.choice(SOURCES)}.bin").read_bytes()
    what = rng.random()
    if what < 0.25:
        data = damaged(source, rng)
    elif what < 0.35:
        data = _hostile(rng)
    elif source[:2] == b"PK":
        data = _rezipped(source, rng)
    else:
        data = _stream(source, rng)
    size = path.write_bytes(data)
    return lambda: read_everything(path), size


def _rezipped(source: bytes, rng: Random) -> bytes:
    """The archive written anew, with records or their descriptions changed."""
    with zipfile.ZipFile(io.BytesIO(source)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    target = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    if rng.random() < 0.8:
        name, data = records[target]
        records[target] = (name, _stream(data, rng))
    if rng.random() < 0.3:
        i = rng.randrange(len(records))
        name, data = records[i]
        kind = rng.randrange(7)
        if kind == 0:
            del records[i]
        elif kind == 1:
            records.insert(i, (name, damaged(data, rng)))
        elif kind == 2:
            records[i] = (name, data[: rng.randrange(len(data) + 1)])
        elif kind == 3:
            records[i] = (
                rng.choice(("../../evil", "/etc/passwd", "archive/data.pkl", "archive/data/0", "x", "a/constants.pkl", name * 20)),
                data,
            )
        elif kind == 4:
            records[i] = (name, data * rng.randint(2, 5))
        elif kind == 5:
            records.append((name.partition("/")[0] + "/byteorder", rng.choice((b"big", b"little", b"", b"x"))))
        else:
            rng.shuffle(records)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED) as archive:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that occur twice
            for name, data in records:
                archive.writestr(name, data)
    data = bytearray(out.getvalue())
    if rng.random() < 0.2:  # sizes, positions and counts in the directory that are not the file's
        start = max(0, data.rfind(b"PK\x01\x02"))
        at = rng.randrange(start, len(data) - 8)
        data[at : at + 4] = rng.choice((0, 1, 2**31, 2**32 - 1, len(data), rng.randrange(2**32))).to_bytes(4, "little")
    return bytes(data)


def _stream(data: bytes, rng: Random) -> bytes:
    """Pickles with instructions changed, removed, repeated or put in, then perhaps damaged."""
    operations, rest = [], b""
    position = 0
    try:
        while position < len(data):  # PyTorch's old format is several pickles, and then bytes
            found = list(pickletools.genops(data[position:]))
            ends = [place for _, _, place in found[1:]] + [found[-1][2] + 1]
            operations += [
                (code, arg, data[position + place : position + end]) for (code, arg, place), end in zip(found, ends, strict=True)
            ]
            position += ends[-1]
    except Exception:  # what comes next is no pickle
        rest = data[position:]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not operations:
            break
        i = rng.randrange(len(operations))
        code, arg, _ = operations[i]
        what = rng.random()
        if what < 0.6 or isinstance(arg, int | str):
            operations[i] = (code, arg, _instruction(code, arg, rng))
        elif what < 0.75:
            del operations[i]
        elif what < 0.9:
            operations.insert(rng.randrange(len(operations)), operations[i])
        else:
            j = rng.randrange(len(operations))
            operations[i], operations[j] = operations[j], operations[i]
    result = b"".join(raw for _, _, raw in operations) + rest
    return damaged(result, rng) if rng.random() < 0.2 else result


def _instruction(code, arg, rng: Random) -> bytes:
    """One of the same kind with another argument, or any."""
    if isinstance(arg, int) and not isinstance(arg, bool) and "PUT" not in code.name and "GET" not in code.name:
        return pickle.dumps(rng.choice(NUMBERS), 2)[2:-1]
    if code.name == "GLOBAL":
        return b"c" + rng.choice(GLOBALS).encode() + b"\n"
    if isinstance(arg, str):
        return pickle.dumps(rng.choice(TEXTS), 2)[2:-1] if rng.random() < 0.8 else _lie(rng)
    return rng.choice(
        (b"N", b"\x88", b")", b"]", b"}", b"(", b"0", b"1", b"2", b"t", b"R", b"Q", b"b", b"s", b"u", b"e", b"a", b".", b"\x81", b"\x93")
    )


def _lie(rng: Random) -> bytes:
    """Instructions that announce more than follows."""
    huge = rng.choice((2**20, 2**31 - 1, 2**31, 2**32 - 1))
    return rng.choice((b"X", b"T", b"B", b"\x8b")) + huge.to_bytes(4, "little") + b"x"


def _hostile(rng: Random) -> bytes:
    """Pickles that want to run something, or to take memory or time, bare or in an archive."""
    command = b"(S'touch pwned'\ntR."
    payload = rng.choice((
        b"c" + rng.choice(GLOBALS).encode() + b"\n" + command,
        b"\x80\x02" + b"(" * rng.choice((10, 10_000, 200_000)) + b"t" * 10_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02]q\x00" + b"".join(b"](" + b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)) + b".",
        b"\x80\x02" + _lie(rng) + b".",
        b"\x80\x04\x95" + rng.choice((2**40, 2**63)).to_bytes(8, "little") + b"N.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nFloatStorage\n" + command,
        b"\x80\x02\x8a\xff" + rng.randbytes(rng.choice((10, 255))) + b".",
        b"\x80" + rng.randbytes(1) + rng.randbytes(50),
    ))  # fmt: skip
    if rng.random() < 0.5:
        return payload
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(64))
    return out.getvalue()
