"""`pymerge lora`: merging LoRA adapters with each other, and taking one out of a tuned model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ..checkpoint.sizes import format_bytes
from .errors import REFUSED, exits_with
from .options import DTYPES, as_json
from .text import print_json

__all__ = ["command"]


@click.group("lora", short_help="Merge LoRA adapters with each other, or extract one.")
def command() -> None:
    """Work with LoRA adapters in PEFT's format.

    To merge adapters into their base, name them in a recipe: `model: base+adapter`.
    """


_ADAPTER = click.Path(path_type=Path)
_RANK = click.option("--rank", type=click.IntRange(1), metavar="N", help="Rank of the result, at most.")
_ENERGY = click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), metavar="X", help="Smallest rank that keeps this part of the squared norm."
)
_DTYPE = click.option("--dtype", type=click.Choice(DTYPES), help="Of the result; by default the inputs' own where nothing is lost.")
_FORCE = click.option("-f", "--force", is_flag=True, help="Replace an existing OUT, once the new one is complete.")


@command.command("merge", short_help="Merge adapters of one base into a new adapter.")
@click.argument("adapters", nargs=-1, required=True, type=_ADAPTER)
@click.option("-o", "--out", required=True, type=_ADAPTER, help="Folder to make.")
@click.option("--method", default="cat", show_default=True, metavar="NAME", help="cat, svd, or a method that `pymerge methods` lists.")
@click.option(
    "-w", "--weight", "weights", type=float, multiple=True, metavar="X", help="One for all adapters, or once for each; default 1."
)
@click.option("--on", type=click.Choice(["products", "factors"]), default="products", show_default=True, help="What the method merges.")
@_RANK
@_ENERGY
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="NAME=X", help="Of the method: density=0.5.")
@_DTYPE
@click.option("--any-base", is_flag=True, help="Merge adapters that name different base models.")
@_FORCE
@as_json
def merge(adapters, out, method, weights, on, rank, energy, parameters, dtype, any_base, force, as_json) -> None:
    """Merge ADAPTERS, folders as PEFT writes them, into a new adapter.

    cat gives exactly the weighted sum of their changes (ranks add up), svd the nearest change of a lower rank to it. Other methods work on
    the products B @ A as they do on whole models, and their result is brought back to a rank by SVD; `--on factors` works on A and B
    separately, as PEFT does, which is cheap but not the merge of the changes.
    """
    from ..checkpoint.adapters import merge_adapters
    from .progress import Progress, shown

    given = {}
    for text in parameters:
        name, found, value = text.partition("=")
        if not found:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--parameter")
        given[name] = _value(value)
    progress = Progress()
    with _usage_errors(), shown("merging", progress, quiet=False):
        report = merge_adapters(
            adapters, out, method=method, weights=_one_or_all(weights), on=on, rank=rank, energy=energy, parameters=given, dtype=dtype,
            check_base=not any_base, force=force, progress=progress,
        )  # fmt: skip
    _print(report, as_json)


def _one_or_all(weights: tuple[float, ...]) -> float | tuple[float, ...] | None:
    return None if not weights else weights[0] if len(weights) == 1 else weights


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Arguments that make no sense together are the user's, and say so without a traceback; so are inputs that cannot be used."""
    from ..checkpoint.format import CheckpointError

    try:
        with exits_with(REFUSED, CheckpointError):
            yield
    except (ValueError, FileExistsError) as error:
        if type(error) not in (ValueError, FileExistsError):
            raise
        raise click.UsageError(str(error)) from None


def _print(report, as_json: bool) -> None:
    if as_json:
        content = {"out": str(report.out), "bytes": report.nbytes, "ranks": report.ranks, "kept": report.kept, "warnings": report.warnings}
        print_json("lora/1", content)
        return
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    low, high = min(report.ranks.values()), max(report.ranks.values())
    lost = min(report.kept.values())
    kept = "exact" if lost == 1.0 else f"at least {100 * lost:.4g} % of each module's squared norm kept"
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    click.echo(f"{report.out}: {len(report.ranks)} modules, {rank}, {format_bytes(report.nbytes)}, {kept}")


@command.command("extract", short_help="Take an adapter out of a tuned model and its base.")
@click.argument("model", type=_ADAPTER)
@click.argument("base", type=_ADAPTER)
@click.argument("out", type=_ADAPTER)
@_RANK
@_ENERGY
@click.option("--modules", metavar="REGEX", help="Modules to adapt; by default all that changed but embeddings and the head.")
@click.option("--whole", multiple=True, metavar="NAME", help="Modules to store as they are in MODEL, such as lm_head.")
@click.option("--fan-in-fan-out/--no-fan-in-fan-out", default=None, help="Weights are (in, out), as in GPT-2; by default from config.json.")
@click.option("--base-name", metavar="NAME", help="Name of the base to write; by default BASE.")
@_DTYPE
@_FORCE
@as_json
def extract(model, base, out, rank, energy, modules, whole, fan_in_fan_out, base_name, dtype, force, as_json) -> None:
    """Write to OUT the LoRA adapter nearest to what MODEL changed in BASE; of rank 16, unless --rank or --energy says otherwise."""
    from ..checkpoint.lora.extract import extract_lora
    from .progress import Progress, shown

    rank = 16 if rank is None and energy is None else rank
    progress = Progress()
    with _usage_errors(), shown("extracting", progress, quiet=False):
        report = extract_lora(
            model, base, out, rank=rank, energy=energy, modules=modules, whole=whole, fan_in_fan_out=fan_in_fan_out, base_name=base_name,
            dtype=dtype, force=force, progress=progress,
        )  # fmt: skip
    _print(report, as_json)
