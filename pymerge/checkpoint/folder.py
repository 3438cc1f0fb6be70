"""Which files make up the checkpoint that a path names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .format import MAX_HEADER_BYTES, CheckpointError, load_json, open_regular
from .links import check_link

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "Layout", "adapter_weights", "find_files", "only_adapter"]

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
PICKLED_INDEX_SUFFIX = ".bin.index.json"
PICKLED = (".bin", ".pt", ".pth")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

BESIDE = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state.pth")
"""What a Trainer leaves in a model folder that is not the model."""


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint.

    Attributes:
        folder: where config.json and the tokenizer lie; None for a checkpoint that is one file.
        files: the files with tensors.
        index: the index file, if any.
        weight_map: the index's name -> file name, if any.
        pickled: the files are in PyTorch's format, not safetensors files.
    """

    folder: Path | None
    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None
    pickled: bool = False


def find_files(path: Path) -> Layout:
    """The files of the checkpoint at `path`: a .safetensors, .bin, .pt or .pth file, an index file, or a folder with either.

    Raises:
        CheckpointError: there is no checkpoint, it is ambiguous which one is meant, or its index is malformed.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; name a .safetensors file or a folder with a checkpoint")
    if path.name.endswith(INDEX_SUFFIX):
        return _from_index(path, named_by_us=False)
    if path.name.endswith(PICKLED_INDEX_SUFFIX):
        return _from_index(path, pickled=True, named_by_us=False)
    if path.suffix == ".safetensors":
        return Layout(None, (path,))
    if path.suffix in PICKLED:
        return Layout(None, (path,), pickled=True)
    raise CheckpointError(f"{path}: is neither a .safetensors, .bin, .pt or .pth file nor a folder with a checkpoint")


def only_adapter(path: Path) -> bool:
    """Whether a path is a folder with an adapter and no model."""
    return path.is_dir() and _is_adapter_alone({entry.name for entry in path.iterdir()})


def _in_folder(folder: Path) -> Layout:
    names = sorted(entry.name for entry in folder.iterdir())
    if _is_adapter_alone(set(names)):
        raise CheckpointError(f"{folder}: is a LoRA adapter, not a model; name it together with its model (in a recipe: model+adapter)")
    found = _one_kind(folder, names, SINGLE, INDEX_SUFFIX, (".safetensors",), pickled=False) or _one_kind(
        folder, [name for name in names if name not in BESIDE], PICKLED_SINGLE, PICKLED_INDEX_SUFFIX, PICKLED, pickled=True
    )
    if found is None:
        raise CheckpointError(
            f"{folder}: holds no {SINGLE}, no *{INDEX_SUFFIX} and no {PICKLED_SINGLE}; name the folder, or the file, that has the weights"
        )
    return found


def _is_adapter_alone(names: set[str]) -> bool:
    models = {SINGLE, SINGLE + ".index.json", PICKLED_SINGLE, PICKLED_SINGLE + ".index.json"}
    return bool({ADAPTER_CONFIG, *ADAPTER_WEIGHTS} & names) and not models & names


def adapter_weights(folder: Path) -> Path | None:
    """The file with the weights of the adapter that a folder holds, None when it holds none.

    Raises:
        CheckpointError: it is a link out of the folder.
    """
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if file is not None:
        check_link(file)
    return file


def _one_kind(folder: Path, names: list[str], single: str, index_suffix: str, suffixes: tuple[str, ...], *, pickled: bool) -> Layout | None:
    """The checkpoint that a folder has in one format, None when it has no file of it."""
    indices = [name for name in names if name.endswith(index_suffix)]
    index = single + ".index.json"
    if single in names and index in names:
        raise CheckpointError(f"{folder}: holds both {single} and {index}; name the one you mean by its own path")
    if single in names:
        return Layout(folder, (folder / single,), pickled=pickled)
    if len(indices) > 1 and index not in indices:
        raise CheckpointError(f"{folder}: holds several indices ({', '.join(indices)}); name the one you mean by its own path")
    if indices:
        return _from_index(folder / (index if index in indices else indices[0]), pickled)
    files = [name for name in names if name.endswith(suffixes)]
    if len(files) > 1:
        raise CheckpointError(f"{folder}: holds {len(files)} {'/'.join(suffixes)} files, but neither {single} nor an index that lists them")
    return Layout(folder, (folder / files[0],), pickled=pickled) if files else None


def _from_index(index: Path, pickled: bool = False, named_by_us: bool = True) -> Layout:
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
        _check_shard_name(file_name, index, PICKLED if pickled else (".safetensors",))
    folder = index.parent
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} shards are missing, the first: {missing[0]}; download them too")
    return Layout(folder, tuple(folder / name for name in names), index, weight_map, pickled)


def _check_shard_name(name: str, index: Path, suffixes: tuple[str, ...]) -> None:
    """A shard lies beside its index. (It may be a symbolic link, see :mod:`pymerge.checkpoint.links`.)"""
    if "/" in name or "\\" in name or ":" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{index}: shard {name!r} points outside the folder of the index")
    if not name.endswith(suffixes) or not name.isprintable():
        raise CheckpointError(f"{index}: shard {name!r} is not the name of a {' or '.join(suffixes)} file")
