"""Which files make up the checkpoint that a path names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .format import MAX_HEADER_BYTES, CheckpointError, load_json, open_regular
from .links import check_link

__all__ = ["Layout", "find_files"]

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint.

    Attributes:
        folder: where config.json and the tokenizer lie; None for a checkpoint that is one file.
        files: the safetensors files.
        index: the index file, if any.
        weight_map: the index's name -> file name, if any.
    """

    folder: Path | None
    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None


def find_files(path: Path) -> Layout:
    """The files of the checkpoint at `path`: a .safetensors file, an index file, or a folder with either.

    Raises:
        CheckpointError: there is no checkpoint, it is ambiguous which one is meant, or its index is malformed.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; name a .safetensors file or a folder with a checkpoint")
    if path.name.endswith(INDEX_SUFFIX):
        return _from_index(path, named_by_us=False)
    if path.suffix == ".safetensors":
        return Layout(None, (path,))
    raise CheckpointError(f"{path}: is neither a .safetensors file nor a folder with a checkpoint")


def _in_folder(folder: Path) -> Layout:
    names = sorted(entry.name for entry in folder.iterdir())
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if SINGLE in names and SINGLE + ".index.json" in names:
        raise CheckpointError(f"{folder}: holds both {SINGLE} and {SINGLE}.index.json; name the one you mean by its own path")
    if SINGLE in names:
        return Layout(folder, (folder / SINGLE,))
    if SINGLE + ".index.json" in indices:
        return _from_index(folder / (SINGLE + ".index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: holds several indices ({', '.join(indices)}); name the one you mean by its own path")
    if indices:
        return _from_index(folder / indices[0])
    if "adapter_model.safetensors" in names:
        raise CheckpointError(f"{folder}: is a LoRA adapter, not a model; adapters are not supported yet: merge it into its model first")
    single = [name for name in names if name.endswith(".safetensors")]
    if len(single) == 1:
        return Layout(folder, (folder / single[0],))
    if single:
        raise CheckpointError(f"{folder}: holds {len(single)} .safetensors files, but neither {SINGLE} nor an index that lists them")
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    hint = f"; convert {pickled[0]} to safetensors first (pickled files can run code when loaded and are not read)" if pickled else ""
    raise CheckpointError(f"{folder}: holds no {SINGLE} and no *{INDEX_SUFFIX}{hint}")


def _from_index(index: Path, named_by_us: bool = True) -> Layout:
    if named_by_us:
        check_link(index)
    fd, info = open_regular(index)
    with open(fd, "rb") as file:
        if info.st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{index}: is {info.st_size} bytes long, more than the {MAX_HEADER_BYTES} allowed for an index")
        content = load_json(file.read(), str(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' object with entries; download the index again")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise CheckpointError(f"{index}: weight_map[{name!r}] is not a file name")
        _check_shard_name(file_name, index)
    folder = index.parent
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} shards are missing, the first: {missing[0]}; download them too")
    return Layout(folder, tuple(folder / name for name in names), index, weight_map)


def _check_shard_name(name: str, index: Path) -> None:
    """A shard lies beside its index. (It may be a symbolic link, see :mod:`pymerge.checkpoint.links`.)"""
    if "/" in name or "\\" in name or ":" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{index}: shard {name!r} points outside the folder of the index")
    if not name.endswith(".safetensors") or not name.isprintable():
        raise CheckpointError(f"{index}: shard {name!r} is not the name of a .safetensors file")
