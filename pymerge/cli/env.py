"""`pymerge env`."""

from __future__ import annotations

import click

from .options import as_json
from .text import print_json

__all__ = ["command"]


@click.command("env", short_help="Show versions, backends and the machine: for bug reports.")
@as_json
def command(as_json) -> None:
    """Show the versions of pymerge and what it uses, its backends, and the machine, as a bug report needs them."""
    from ..speed.machine import describe

    about = describe()
    if as_json:
        print_json("env/1", about)
        return
    width = max(map(len, about))
    for key, value in about.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else "no" if value is None else value
        click.echo(f"{key.replace('_', ' '):<{width}}  {shown}")
