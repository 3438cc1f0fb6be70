"""`pymerge diagnose`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .options import as_json
from .text import printable

__all__ = ["command"]


@click.command("diagnose", short_help="Is a merge likely to work? Check its premises.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--trim",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.2,
    show_default=True,
    help="Share of the largest changes whose signs are compared.",
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw angles, sizes and conflicts into this file (.png, .pdf, .svg).")
@click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads that read and compute; by default one per CPU, at most 8."
)
@as_json
def command(recipe, trim, plot, threads, as_json) -> int:
    """Check on the models that RECIPE names whether merging them is likely to work, and say why.

    Do they share a base? Are they near it? Does one dominate, do their changes contradict each other? Reads every model once and writes
    nothing. These are premises, not a forecast: how good the result is, only an evaluation shows.

    Exit status: 0 nothing speaks against it, 3 doubtful, 4 not likely to work, 2 a recipe that cannot be merged at all.
    """
    if plot:
        try:
            import matplotlib  # noqa: F401 - before the models are read
        except ModuleNotFoundError as error:
            raise click.UsageError(f'{error.name} is not installed: pip install "pymerge-kernels[report]"') from None
    from ..checkpoint.format import CheckpointError
    from ..checkpoint.plan import make_plan
    from ..diagnostics.premises import diagnose_merge
    from ..finite import NonFiniteError

    with make_plan(recipe) as plan:
        for warning in plan.warnings:
            click.echo(f"warning: {warning}", err=True)
        try:
            diagnosis = diagnose_merge(plan, trim=trim, threads=threads)
        except NonFiniteError as error:
            raise click.ClickException(str(error)) from None
        except CheckpointError:
            raise
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    if plot:
        diagnosis.report.plot().savefig(plot, dpi=150)
    click.echo(json.dumps(diagnosis.to_dict(), indent=1) if as_json else printable(diagnosis.to_text()), nl=as_json)
    return diagnosis.exit_code
