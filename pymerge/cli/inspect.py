"""`pymerge inspect`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from ..checkpoint.sizes import format_bytes
from .errors import REFUSED
from .options import as_json
from .text import printable

__all__ = ["command"]


@click.command("inspect", short_help="Show what is in a checkpoint.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-t", "--tensors", is_flag=True, help="List every tensor.")
@click.option("-m", "--metadata", is_flag=True, help="Print the metadata, such as the recipe that a merge was made by.")
@as_json
def command(checkpoint, tensors, metadata, as_json) -> None:
    """Show what is in CHECKPOINT: a .safetensors file, or a folder with model.safetensors or shards and an index.

    Reads and checks the headers only. Exits with 2 when a file is malformed.
    """
    from ..checkpoint.format import CheckpointError
    from ..checkpoint.reader import open_checkpoint

    try:
        opened = open_checkpoint(checkpoint)
    except CheckpointError as error:
        click.echo(f"error: {error}", err=True)
        raise click.exceptions.Exit(REFUSED) from None
    if as_json:
        click.echo(json.dumps(_as_dict(opened, tensors), indent=2))
        return
    _print(opened)
    if metadata:
        for header in opened.headers[:1]:
            for key, value in header.metadata.items():
                key, value = printable(key), printable(value)
                click.echo(f"\n{key}:\n{value.rstrip()}" if "\n" in value else f"\n{key}: {value}")
    if tensors:
        click.echo("")
        for info in opened.tensors.values():
            click.echo(f"{printable(info.name)}  {info.dtype} {list(info.shape)}  {format_bytes(info.nbytes)}  {info.file.name}")


def _as_dict(opened, tensors: bool) -> dict:
    result = {
        "path": str(opened.path),
        "files": [{"name": h.file.name, "bytes": h.size, "tensors": len(h.tensors), "metadata": h.metadata} for h in opened.headers],
        "tensors": len(opened.tensors),
        "parameters": sum(info.numel for info in opened.tensors.values()),
        "bytes": opened.nbytes,
        "dtypes": dict(Counter(info.dtype for info in opened.tensors.values())),
    }
    if tensors:
        result["tensor_list"] = [
            {"name": i.name, "dtype": i.dtype, "shape": list(i.shape), "bytes": i.nbytes, "file": i.file.name, "offset": i.offset}
            for i in opened.tensors.values()
        ]
    return result


def _print(opened) -> None:
    infos = opened.tensors.values()
    count = sum(info.numel for info in infos)
    files = f"{len(opened.headers)} file{'s' if len(opened.headers) > 1 else ''}"
    click.echo(f"{opened.path}: {len(infos)} tensors, {count:,} parameters, {format_bytes(opened.nbytes)} in {files}")
    sizes: Counter = Counter()
    for info in infos:
        sizes[info.dtype] += info.nbytes
    for dtype, size in sizes.most_common():
        click.echo(f"  {dtype:<8} {sum(i.dtype == dtype for i in infos)} tensors, {format_bytes(size)}")
    if infos:
        largest = max(infos, key=lambda info: info.nbytes)
        click.echo(f"  largest  {printable(largest.name)} {list(largest.shape)}, {format_bytes(largest.nbytes)}")
    version = next((h.metadata["pymerge_version"] for h in opened.headers if "pymerge_version" in h.metadata), None)
    if version:
        click.echo(f"  merged by pymerge {printable(version)}; --metadata prints the recipe")
