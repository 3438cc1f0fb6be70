"""`pymerge methods`."""

from __future__ import annotations

import shutil
import textwrap

import click

from .options import as_json
from .text import print_json

__all__ = ["command"]

_BASE = {"required": "needs a base_model", "optional": "base_model optional", "model": "a base_model is one more model"}


@click.command("methods", short_help="List the merge methods and their parameters.")
@click.argument("name", required=False)
@as_json
def command(name, as_json) -> None:
    """List the merge methods that a recipe can name, or describe the one called NAME with its parameters."""
    from .. import merge_methods  # noqa: F401 - registers the built-in methods
    from ..merge_methods.registry import get_method, methods

    if name is not None and name not in methods():
        from ..recipe.problems import did_you_mean

        near = did_you_mean(name, methods())
        raise click.UsageError(f"there is no method {name!r}{near or '; `pymerge methods` lists them'}")
    chosen = [get_method(n) for n in ([name] if name else methods())]
    if as_json:
        print_json("methods/1", {"methods": [_as_dict(method) for method in chosen]})
    elif name:
        _describe(chosen[0])
    else:
        width = max(len(method.name) for method in chosen)
        room = max(40, min(shutil.get_terminal_size().columns, 120) - width - 2)
        for method in chosen:
            summary = textwrap.fill(method.summary, room).replace("\n", "\n" + " " * (width + 2))
            click.echo(f"{method.name:<{width}}  {summary}")
        click.echo("\n`pymerge methods NAME` describes one with its parameters.")


def _default(parameter) -> tuple[bool, object]:
    from ..merge_methods.registry import REQUIRED

    return parameter.default is REQUIRED, None if parameter.default is REQUIRED else parameter.default


def _as_dict(method) -> dict:
    parameters = []
    for p in method.parameters:
        required, default = _default(p)
        parameters.append(
            {"name": p.recipe, "type": p.kind.__name__, "required": required, "default": default, "per_model": p.per_model, "doc": p.doc}
        )
    return {
        "name": method.name, "summary": method.summary, "source": method.source, "base_model": method.base,
        "min_models": method.min_models, "max_models": method.max_models, "parameters": parameters,
    }  # fmt: skip


def _describe(method) -> None:
    count = str(method.min_models) if method.min_models == method.max_models else f"{method.min_models} to {method.max_models}"
    click.echo(f"{method.name}: {method.summary}")
    click.echo(f"{_BASE[method.base]}; {count} model{'s' if count != '1' else ''}{' besides it' if method.base == 'required' else ''}")
    if method.source:
        click.echo(method.source)
    if not method.parameters:
        return
    click.echo("\nparameters:")
    rows = []
    for p in method.parameters:
        required, default = _default(p)
        state = "required" if required else "" if default is None else f"default {str(default).lower() if p.kind is bool else default}"
        rows.append((p.recipe, p.kind.__name__, ", ".join(x for x in (state, "may differ by model" if p.per_model else "") if x), p.doc))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        click.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())
