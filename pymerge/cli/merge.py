"""`pymerge merge`."""

from __future__ import annotations

from pathlib import Path

import click

from ..checkpoint.sizes import format_bytes
from .options import merge_options

__all__ = ["command"]


@click.command("merge", short_help="Merge checkpoints by a recipe.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@merge_options
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads that read and compute; by default one per CPU.")
@click.option("--no-check-finite", is_flag=True, help="Let NaN and infinities in inputs through.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(recipe, out, shard_size, dtype, out_dtype, seed, download, force, threads, no_check_finite, quiet) -> None:
    """Merge checkpoints as RECIPE says and write the result to OUT.

    RECIPE is a YAML or JSON file in mergekit's format. OUT is a folder to make (shards, index, config, tokenizer, README.md) or a file
    that ends in .safetensors (the weights alone).

    When all models are LoRA adapters, they are merged into a new adapter (see `pymerge lora merge`).

    Models are .safetensors files, or folders with model.safetensors or shards and an index. Relative paths are looked up in the recipe's
    folder first, then in the current one. Everything is checked before anything is read; memory stays near the largest tensor of each
    model; OUT appears when it is complete. A file with several recipes is merged into folders of their names in OUT.
    """
    from ..checkpoint.adapter_recipe import is_adapter_recipe, merge_adapter_recipe
    from ..checkpoint.many import plan_merges
    from ..checkpoint.merge import run_plan
    from .progress import progress_bar

    if is_adapter_recipe(recipe):
        report = merge_adapter_recipe(recipe, out, dtype=out_dtype or dtype, seed=seed, force=force)
        if not quiet:
            for warning in report.warnings:
                click.echo(f"warning: {warning}", err=True)
            click.echo(f"{out}: an adapter of {report.tensors // 2} modules, {format_bytes(report.bytes_written)}")
        return
    options = {"shard_size": shard_size, "dtype": dtype, "out_dtype": out_dtype, "seed": seed, "download": download}
    for place, plan in plan_merges(recipe, out, force=force, **options):
        if plan is None:
            if not quiet:
                click.echo(f"{place}: is there already")
            continue
        with plan:
            if not quiet:
                for warning in plan.warnings:
                    click.echo(f"warning: {warning}", err=True)
            with progress_bar(plan.bytes_read + plan.bytes_written, quiet) as progress:
                report = run_plan(plan, place, force=force, check_finite=not no_check_finite, progress=progress, threads=threads)
        if not quiet:
            moved = report.bytes_read + report.bytes_written
            click.echo(
                f"{place}: {report.tensors} tensors, {format_bytes(report.bytes_written)}, "
                f"merged by {plan.method.name} in {report.seconds:.1f} s ({format_bytes(moved / max(report.seconds, 1e-9))}/s)"
            )
