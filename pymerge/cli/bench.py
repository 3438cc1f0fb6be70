"""`pymerge bench`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import click

from ..checkpoint.sizes import format_bytes
from .options import Size, as_json
from .text import number, print_json, table

__all__ = ["command"]

DTYPES = ("bfloat16", "float16", "float32", "float64")


class _Count(click.ParamType):
    """A number of elements: 1000000, 16M."""

    name = "count"

    def convert(self, value, param, ctx) -> int:
        match = re.fullmatch(r"(\d{1,15})([kMG]?)", str(value))
        if not match or not int(match.group(1)):
            self.fail(f"{value!r} is not a number of elements; write 1000000, 16M or 1G (k, M and G are powers of 1024)", param, ctx)
        return int(match.group(1)) << {"": 0, "k": 10, "M": 20, "G": 30}[match.group(2)]


@click.command("bench", short_help="Measure this machine, and the merge methods on it.")
@click.argument("methods", nargs=-1, metavar="[METHOD]...")
@click.option(
    "--size", "sizes", type=_Count(), multiple=True, default=("16M",), show_default=True, metavar="N", help="Elements; repeatable."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of all tensors.")
@click.option(
    "--models", type=click.IntRange(1, 64), default=3, show_default=True, metavar="N", help="To merge, where a method takes so many."
)
@click.option("--seconds", type=click.FloatRange(0.01, 3600), default=1.0, show_default=True, help="To spend on each method and size.")
@click.option("--disk", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Measure the disk of this folder too.")
@click.option("--disk-size", type=Size(), default="1GB", show_default=True, metavar="SIZE", help="Of the file written there.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="That compute; by default one per CPU.")
@as_json
def command(methods, sizes, dtype, models, seconds, disk, disk_size, threads, as_json) -> None:
    """Measure how fast this machine copies, and how fast each METHOD (by default all) merges random models.

    A merge has to read its inputs and write its output once, so the best it can do is a copy of as many bytes: `to copy` is the merge's
    time over that of the fastest parallel copy, timed in turn with it, and its quartiles; `extra` is the memory that it takes beside its
    inputs and its output. A result that is not the reference's, bit for bit, ends the benchmark with status 1 and no speed.
    """
    import torch

    from .. import merge_methods  # noqa: F401 - registers the built-in methods
    from ..merge_methods import registry
    from ..speed import ceiling, machine
    from ..speed.methods import WrongResult, time_method
    from ..speed.weights import Weights

    for name in methods:
        if name not in registry.methods():
            from ..recipe.problems import did_you_mean

            near = did_you_mean(name, registry.methods())
            raise click.UsageError(f"there is no method {name!r}{near or '; `pymerge methods` lists them'}")
    if threads is not None:
        torch.set_num_threads(threads)
    element = getattr(torch, dtype).itemsize
    _check_memory(max(sizes), element, models, ceiling.LARGEST)

    about = machine.describe()
    copy, read = ceiling.memory_rates()
    rates = None
    if disk is not None:
        from ..speed.disk import disk_rates

        rates = disk_rates(disk, disk_size)
    if not as_json:
        _print_machine(about, copy, read, disk, rates)
    timings, skipped = [], []
    for size in sizes:
        weights = Weights.random(size, getattr(torch, dtype), models)
        for name in methods or registry.methods():
            _show(f"{name}, {_elements(size)} elements")
            try:
                timings.append(time_method(name, weights, seconds))
            except ValueError as error:
                skipped.append(str(error))
            except WrongResult as error:
                raise click.ClickException(str(error)) from None
    _show("")
    if not as_json:
        _print_timings(timings, skipped)
        return
    print_json(
        "bench/1",
        {
            "machine": about,
            "memory": {"copy_bytes_per_second": copy, "read_bytes_per_second": read},
            "disk": None if rates is None else _disk_as_dict(disk, rates),
            "methods": [_as_dict(t) for t in timings],
            "skipped": skipped,
        },
    )


def _show(now: str) -> None:
    """What is being timed, on one line of a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{now}", err=True, nl=False)


def _check_memory(elements: int, element: int, models: int, copied: int) -> None:
    """Base, models and output, the copy of at most `copied` bytes, and the chunk in fp32 that the tensors are made from."""
    tensors = elements * element * (models + 2)
    need = tensors + min(tensors, copied) + 2**28
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    if need > there:
        raise click.UsageError(
            f"{format_bytes(need)} of memory are needed for that size, and there are {format_bytes(there)}; give a smaller --size"
        )


def _print_machine(about: dict, copy: float, read: float, disk: Path | None, rates) -> None:
    click.echo(f"machine  {about['cpu']}, {about['cores']} cores, {about['isa']}; pymerge {about['pymerge']}, torch {about['torch']}")
    click.echo(f"memory   copies {format_bytes(copy)}/s (read and written), reads {format_bytes(read)}/s, {about['torch_threads']} threads")
    if rates is not None:
        doubt = "" if rates.cold else " (from the page cache: it could not be emptied, so this says nothing about the disk)"
        click.echo(
            f"disk     writes {format_bytes(rates.write)}/s, reads {format_bytes(rates.read)}/s{doubt}, "
            f"again {format_bytes(rates.read_again)}/s, {format_bytes(rates.bytes)} in {disk}"
        )


def _print_timings(timings, skipped: list[str]) -> None:
    click.echo("")
    table(
        ["method", "models", "elements", "dtype", "ms", "speed", "copy ms", "to copy", "quartiles", "extra"],
        [
            [
                t.method, f"{t.models}{' + base' if t.base else ''}", _elements(t.elements), t.dtype, number(1e3 * t.seconds),
                f"{format_bytes(t.bytes / t.seconds)}/s", number(1e3 * t.copy_seconds), f"{t.to_copy[0]:.2f}",
                f"{t.to_copy[1]:.2f}-{t.to_copy[2]:.2f}", "?" if t.extra_bytes is None else format_bytes(t.extra_bytes),
            ]
            for t in timings
        ],
        left=2,
    )  # fmt: skip
    for message in skipped:
        click.echo(f"skipped: {message}", err=True)


def _elements(n: int) -> str:
    for shift, unit in ((30, "G"), (20, "M"), (10, "k")):
        if n >> shift and n % (1 << shift) == 0:
            return f"{n >> shift}{unit}"
    return str(n)


def _as_dict(t) -> dict:
    return {
        "method": t.method, "models": t.models, "base": t.base, "elements": t.elements, "dtype": t.dtype, "bytes": t.bytes,
        "seconds": t.seconds, "copy_seconds": t.copy_seconds, "to_copy": t.to_copy[0], "to_copy_quartiles": t.to_copy[1:],
        "rounds": t.rounds, "extra_bytes": t.extra_bytes,
    }  # fmt: skip


def _disk_as_dict(folder: Path, rates) -> dict:
    return {
        "folder": str(folder), "bytes": rates.bytes, "write_bytes_per_second": rates.write, "read_bytes_per_second": rates.read,
        "read_again_bytes_per_second": rates.read_again, "cold": rates.cold,
    }  # fmt: skip
