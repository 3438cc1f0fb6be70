"""`pymerge inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from ..checkpoint.groups import in_order, layer_of
from ..checkpoint.sizes import format_bytes
from .errors import REFUSED, exits_with
from .options import as_json
from .text import count, print_json, printable, table

__all__ = ["command"]


@click.command("inspect", short_help="Show what is in a checkpoint.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-l", "--layers", is_flag=True, help="List the layers.")
@click.option("-t", "--tensors", is_flag=True, help="List every tensor.")
@click.option("-m", "--metadata", is_flag=True, help="Print the metadata, such as the recipe that a merge was made by.")
@as_json
def command(checkpoint, layers, tensors, metadata, as_json) -> None:
    """Show what is in CHECKPOINT: a .safetensors file, a folder with model.safetensors or shards and an index, an index, or a folder
    with a LoRA adapter.

    Reads and checks the headers only. Exits with 2 when a file is malformed.
    """
    from ..checkpoint.folder import adapter_weights, only_adapter
    from ..checkpoint.reader import open_checkpoint

    with exits_with(REFUSED):
        opened = open_checkpoint((adapter_weights(checkpoint) if only_adapter(checkpoint) else None) or checkpoint)
    if as_json:
        print_json("inspect/1", _as_dict(opened, tensors))
        return
    _print(opened)
    if layers:
        click.echo("")
        groups = _groups(opened, layer_of)
        table(["layer", "tensors", "parameters", "size", "dtypes"], [_row(name, groups[name]) for name in sorted(groups, key=in_order)])
    if tensors:
        click.echo("")
        table(
            ["tensor", "dtype", "shape", "size", *(["file"] if len(opened.files) > 1 else [])],
            [
                [i.name, i.dtype, str(list(i.shape)), format_bytes(i.nbytes), *([i.file.name] if len(opened.files) > 1 else [])]
                for i in sorted(opened.tensors.values(), key=lambda i: in_order(i.name))
            ],
        )
    if metadata:
        _print_metadata(opened)


def _groups(opened, group: Callable[[str], str]) -> dict[str, list]:
    groups: dict[str, list] = {}
    for info in opened.tensors.values():
        groups.setdefault(group(info.name), []).append(info)
    return groups


def _row(name: str, infos: list) -> list[str]:
    parameters, size = sum(i.numel for i in infos), sum(i.nbytes for i in infos)
    return [name, f"{len(infos):,}", f"{parameters:,}", format_bytes(size), ", ".join(sorted({i.dtype for i in infos}))]


def _sizes(infos: Iterable) -> dict:
    infos = list(infos)
    return {"tensors": len(infos), "parameters": sum(i.numel for i in infos), "bytes": sum(i.nbytes for i in infos)}


def _by_dtype(opened) -> dict[str, list]:
    groups: dict[str, list] = {}
    for info in opened.tensors.values():
        groups.setdefault(info.dtype, []).append(info)
    return dict(sorted(groups.items(), key=lambda item: (-sum(i.nbytes for i in item[1]), item[0])))


def _as_dict(opened, tensors: bool) -> dict:
    layers = _groups(opened, layer_of)
    result = {
        "path": str(opened.path),
        **_sizes(opened.tensors.values()),
        "files": _files(opened),
        "dtypes": {dtype: _sizes(infos) for dtype, infos in _by_dtype(opened).items()},
        "layers": [
            {"name": name, **_sizes(layers[name]), "dtypes": dict(Counter(i.dtype for i in layers[name]))}
            for name in sorted(layers, key=in_order)
        ],
    }
    if tensors:
        result["tensor_list"] = [
            {"name": i.name, "dtype": i.dtype, "shape": list(i.shape), "bytes": i.nbytes, "file": i.file.name, "offset": i.offset}
            for i in opened.tensors.values()
        ]
    return result


def _print(opened) -> None:
    infos = opened.tensors.values()
    parameters = sum(info.numel for info in infos)
    click.echo(
        f"{opened.path}: {count(len(infos), 'tensor')}, {parameters:,} parameters, "
        f"{format_bytes(opened.nbytes)} in {count(len(opened.files), 'file')}"
    )
    for dtype, group in _by_dtype(opened).items():
        click.echo(f"  {dtype:<8} {count(len(group), 'tensor')}, {format_bytes(sum(i.nbytes for i in group))}")
    if infos:
        largest = max(infos, key=lambda info: info.nbytes)
        click.echo(f"  largest  {printable(largest.name)} {list(largest.shape)}, {format_bytes(largest.nbytes)}")
    version = next((m["pymerge_version"] for m in _metadata(opened).values() if "pymerge_version" in m), None)
    if version:
        click.echo(f"  merged by pymerge {printable(version)}; --metadata prints the recipe")


def _metadata(opened) -> dict[str, dict[str, str]]:
    """File name -> the strings in its header; only safetensors files have any."""
    return {header.file.name: header.metadata for header in getattr(opened, "headers", ())}


def _files(opened) -> list[dict]:
    metadata, counts = _metadata(opened), Counter(info.file for info in opened.tensors.values())
    return [
        {"name": file.name, "bytes": file.stat().st_size, "tensors": counts[file], "metadata": metadata.get(file.name, {})}
        for file in opened.files
    ]


def _print_metadata(opened) -> None:
    """Of each file; shards that all say the same, as those of a merge do, are told once."""
    distinct = {tuple(sorted(metadata.items())): name for name, metadata in _metadata(opened).items()}
    for content, name in distinct.items():
        if len(distinct) > 1:
            click.echo(f"\n[{name}]")
        for key, value in content:
            key, value = printable(key), printable(value)
            click.echo(f"\n{key}:\n{value.rstrip()}" if "\n" in value else f"\n{key}: {value}")
