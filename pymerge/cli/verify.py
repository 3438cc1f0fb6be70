"""`pymerge verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from .errors import FAILED, REFUSED, exits_with
from .options import as_json, chosen_device, device_option
from .text import print_json, printable

__all__ = ["command"]

SHOWN = 10


@click.command("verify", short_help="Merge tensors of an output again and compare.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the recipe lay: its relative paths start there. By default here, then beside OUT.",
)
@click.option("--sample", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Check N tensors, chosen at random.")
@click.option("--all", "everything", is_flag=True, help="Check all tensors, and the inputs' SHA-256 where recorded.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the choice.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads that read; by default one per CPU.")
@device_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but differences and errors.")
@as_json
def command(out, folder, sample, everything, seed, threads, device, quiet, as_json) -> None:
    """Check that OUT, which pymerge merge wrote, holds what its recipe gives: tensors are merged again from the inputs that it names and
    compared bit for bit. Nothing is written.

    Exits with 0 when everything checked is the same, with 1 when something differs, and with 2 when OUT cannot be checked: it does not
    say how it was made, or an input is not there.
    """
    from ..checkpoint.verify import verify
    from .progress import Progress, shown

    chosen_device(device, None, None)
    progress = Progress()
    with exits_with(REFUSED), shown("verifying", progress, quiet):
        report = verify(
            out, folder=folder, sample=None if everything else sample, seed=seed, progress=progress, threads=threads, device=device
        )  # fmt: skip
    if as_json:
        print_json("verify/1", {**dataclasses.asdict(report), "out": str(report.out), "ok": report.ok})
    else:
        _print(report, quiet)
    if not report.ok:
        raise click.exceptions.Exit(FAILED)


def _print(report, quiet: bool) -> None:
    for problem in report.inputs:
        click.echo(f"input {printable(problem)}")
    for name, what in report.differences[:SHOWN]:
        click.echo(f"{printable(name)}: {what}")
    if len(report.differences) > SHOWN:
        click.echo(f"... and {len(report.differences) - SHOWN} more tensors")
    checked = f"{len(report.checked)} of {report.tensors} tensors"
    if not report.ok:
        click.echo(f"{report.out}: is not what its recipe gives now; {checked} compared, {len(report.differences)} differ")
    elif not quiet:
        click.echo(f"{report.out}: {checked} compared, all the same")
