"""`pymerge diff`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from ..checkpoint.groups import in_order
from ..checkpoint.sizes import format_bytes
from .errors import REFUSED, exits_with
from .options import as_json
from .text import count, number, print_json, printable, table

__all__ = ["command"]

DIFFERENT = 1
SHOWN = 20
"""Tensors that only one side has, listed by name; --json has all."""

_ORDERS = {
    "name": lambda d: in_order(d.name),
    "drift": lambda d: -_or_last(d.relative),
    "max": lambda d: -_or_last(d.max_abs),
    "cosine": lambda d: -_or_last(-d.cosine),
    "changed": lambda d: -d.changed_fraction,
    "size": lambda d: -d.bytes,
}


def _or_last(value: float) -> float:
    return math.inf if math.isnan(value) else value  # NaN is what one wants to see first


@click.command("diff", short_help="Show how far one checkpoint is from another.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--by", type=click.Choice(["layer", "kind", "tensor"]), default="layer", show_default=True, help="What a row is about.")
@click.option("--sort", type=click.Choice(list(_ORDERS)), default="name", show_default=True, help="The order of rows, largest first.")
@click.option("--top", type=click.IntRange(1), metavar="N", help="Print the first N rows only.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the drift over the layers into this .png, .svg or .pdf."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors; the exit status tells.")
@as_json
def command(a, b, by, sort, top, plot, quiet, as_json) -> None:
    """Show how far checkpoint A is from checkpoint B: `pymerge diff tuned/ base/`.

    Drift is the length of the difference relative to B, ||A - B|| / ||B||; changed is the share of elements that are not the same. Each
    tensor is read once, in pieces. Dtypes may differ.

    Exit status: 0 the same tensors, bit for bit; 1 there are differences; 2 they could not be compared.
    """
    with exits_with(REFUSED):
        if plot is not None:
            _check_plot(plot)
        from ..checkpoint.drift import diff
        from .progress import Progress, shown

        progress = Progress()
        with shown("comparing", progress, quiet):
            result = diff(a, b, progress=progress)
        if plot is not None:
            from ..checkpoint.drift_plot import plot_drift

            plot_drift(result, plot, f"{a} from {b}")
    rows = {"layer": result.by_layer, "kind": result.by_kind, "tensor": lambda: result.tensors}[by]()
    rows = sorted(rows, key=_ORDERS[sort])[:top]
    if as_json:
        print_json("diff/1", _as_dict(a, b, by, result, rows))
    elif not quiet:
        _print(by, result, rows)
    if not result.equal:
        raise click.exceptions.Exit(DIFFERENT)


def _check_plot(file: Path) -> None:
    """Before anything is read: a picture that cannot be drawn is told now."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'pymerge-kernels[plot]'")
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot {file}: the name has to end in .png, .svg or .pdf")
    if not file.absolute().parent.is_dir():
        raise click.UsageError(f"--plot {file}: there is no folder {file.absolute().parent}; make it first")


def _print(by: str, result, rows) -> None:
    if result.equal:
        click.echo(f"equal: {count(len(result.tensors), 'tensor')}, {format_bytes(result.total.bytes)}, bit for bit")
        return
    if result.tensors:
        total = [result.total] if len(rows) > 1 else []
        table(
            [by, *([] if by == "tensor" else ["tensors"]), "size", "drift", "max |a-b|", "cosine", "changed"],
            [
                [d.name, *([] if by == "tensor" else [str(d.tensors)]), format_bytes(d.bytes), number(d.relative), number(d.max_abs),
                 f"{d.cosine:.6f}", _percent(d)]
                for d in [*rows, *total]
            ],
        )  # fmt: skip
    changed = sum(t.changed > 0 for t in result.tensors)
    click.echo(f"\n{count(len(result.tensors), 'tensor')} compared: {changed:,} differ, {len(result.tensors) - changed:,} are equal")
    recast = _recast(result)
    if recast:
        kinds = sorted({f"{x} in A, {y} in B" for x, y in (t.dtypes for t in recast)})
        click.echo(f"{count(len(recast), 'tensor')} of different dtype ({'; '.join(kinds)}), compared by value")
    for side, infos in (("A", result.only_in_a), ("B", result.only_in_b)):
        _list(f"only in {side}", [f"{printable(i.name)}  {i.dtype} {list(i.shape)}" for i in infos])
    _list("of different shape", [f"{printable(x.name)}  {list(x.shape)} in A, {list(y.shape)} in B" for x, y in result.reshaped])


def _recast(result) -> list:
    return [t for t in result.tensors if t.dtypes[0] != t.dtypes[1]]


def _list(title: str, lines: list[str]) -> None:
    if lines:
        click.echo(f"{count(len(lines), 'tensor')} {title}:")
        for line in lines[:SHOWN]:
            click.echo(f"  {line}")
        if len(lines) > SHOWN:
            click.echo(f"  ... and {len(lines) - SHOWN} more; --json lists them all")


def _percent(d) -> str:
    fraction = 100 * d.changed_fraction
    # 100.0 % and 0.0 % are said of what is exactly that.
    rounded = min(fraction, 99.9) if d.changed < d.elements else fraction
    return f"{max(rounded, 0.1) if d.changed else rounded:.1f} %"


def _as_dict(a: Path, b: Path, by: str, result, rows) -> dict:
    return {
        "a": str(a),
        "b": str(b),
        "equal": result.equal,
        "total": _drift(result.total),
        "by": by,
        "rows": [_drift(d) for d in rows],
        "only_in_a": [_info(i) for i in result.only_in_a],
        "only_in_b": [_info(i) for i in result.only_in_b],
        "different_shape": [{"name": x.name, "shape_a": list(x.shape), "shape_b": list(y.shape)} for x, y in result.reshaped],
        "different_dtype": [{"name": t.name, "dtype_a": t.dtypes[0], "dtype_b": t.dtypes[1]} for t in _recast(result)],
    }  # fmt: skip


def _drift(d) -> dict:
    return {
        "name": d.name, "tensors": d.tensors, "elements": d.elements, "bytes": d.bytes, "relative_drift": d.relative,
        "max_abs": d.max_abs, "cosine": d.cosine, "changed": d.changed, "changed_fraction": d.changed_fraction,
    }  # fmt: skip


def _info(info) -> dict:
    return {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
