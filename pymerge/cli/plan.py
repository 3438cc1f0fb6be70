"""`pymerge plan`."""

from __future__ import annotations

from pathlib import Path

import click

from ..checkpoint.sizes import format_bytes
from .options import as_json, budget_options, chosen_device, device_as_dict, merge_options
from .text import count, number, print_json, printable, table

__all__ = ["command"]

WORKSPACE = 350_000_000
"""Bytes that Python, torch and the method's own scratch space take besides the buffers; measured, rounded up."""


@click.command("plan", short_help="Check a recipe and show what it would do.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@merge_options
@budget_options
@click.option("-v", "--verbose", "-t", "--tensors", "verbose", is_flag=True, help="List every tensor with its parameters.")
@as_json
def command(recipe, out, memory, device, device_memory, verbose, as_json, **options) -> None:
    """Check RECIPE against the models it names, and OUT if given; show what would be read, merged and written, and the memory it takes.

    Reads headers only and writes nothing. Exits with 2 and lists every problem when the merge could not be done.
    """
    from ..checkpoint.plan import make_plan

    chosen = chosen_device(device, device_memory, memory)
    with make_plan(recipe, out, **options) as plan:
        try:
            schedule = plan.schedule(memory, device=chosen)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        if as_json:
            print_json("plan/1", _as_dict(plan, schedule, verbose))
        else:
            _print(plan, schedule, verbose)
            if out is None:
                click.echo(f"\nto do it: pymerge merge {recipe} OUT")


def _as_dict(plan, schedule, tensors: bool) -> dict:
    result = {
        "merge_method": plan.method.name,
        "recipe": plan.recipe.to_dict(),
        "models": [
            {"name": name, "path": str(plan.checkpoints[index].path), "role": role, "bytes": plan.checkpoints[index].nbytes}
            for name, role, index in _inputs(plan)
        ],
        "tensors": len(plan.tensors),
        "copied_tensors": sum(t.copied for t in plan.tensors),
        "bytes_read": schedule.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory_bytes": schedule.buffers.total + WORKSPACE,
        "device": device_as_dict(schedule.device),
        "files": [{"name": shard.file_name, "bytes": shard.size} for shard in plan.layout.shards],
        "config_from": str(plan.donor) if plan.donor else None,
        "warnings": [*plan.warnings, *schedule.warnings],
    }
    if tensors:
        result["tensor_list"] = [
            {
                "name": t.output.name,
                "dtype": t.output.dtype,
                "shape": list(t.output.shape),
                "inputs": [{"path": str(plan.checkpoints[index].path), "name": info.name, "dtype": info.dtype} for index, info in t.inputs],
                "copied": t.copied,
                "parameters": t.parameters,
            }
            for t in plan.tensors
        ]
    return result


def _inputs(plan) -> list[tuple[str, str, int]]:
    return [(name, "base" if index in plan.bases else "model", index) for index, name in enumerate(plan.names)]


def _print(plan, schedule, tensors: bool) -> None:
    for warning in (*plan.warnings, *schedule.warnings):
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"method   {plan.method.name}: {plan.method.summary}")
    for name, role, index in _inputs(plan):
        checkpoint = plan.checkpoints[index]
        sizes = f"{count(len(checkpoint.tensors), 'tensor')}, {format_bytes(checkpoint.nbytes)} in {count(len(checkpoint.files), 'file')}"
        click.echo(f"{role:<8} {name}  ({sizes})")
    copied = sum(t.copied for t in plan.tensors)
    click.echo(
        f"merge    {count(len(plan.tensors) - copied, 'tensor')}" + (f", copy {copied} that are not floating point" if copied else "")
    )
    click.echo(f"read     {format_bytes(schedule.bytes_read)}")
    shards = plan.layout.shards
    files = shards[0].file_name if len(shards) == 1 else f"{len(shards)} files of at most {format_bytes(max(s.size for s in shards))}"
    dtypes = ", ".join(sorted({t.output.dtype for t in plan.tensors}))
    click.echo(f"write    {format_bytes(plan.bytes_written)} of {dtypes} in {files}")
    buffers = schedule.buffers.total
    click.echo(f"memory   about {format_bytes(buffers + WORKSPACE)}, of which {format_bytes(buffers)} for tensors on their way")
    if schedule.device is not None:
        device, buffers = schedule.device, schedule.device_buffers.total
        memory = f"at most {format_bytes(device.memory)}, of which {format_bytes(buffers)} for tensors on their way"
        click.echo(f"device   {device.title}, by {device.backend}: {memory}")
    if plan.donor:
        click.echo(f"copy     config and tokenizer of {plan.donor}")
    if tensors:
        click.echo("")
        table(
            ["tensor", "dtype", "shape", "from", "parameters"],
            [[t.output.name, t.output.dtype, str(list(t.output.shape)), _origin(plan, t), _parameters(t)] for t in plan.tensors],
            left=5,
        )


def _origin(plan, tensor) -> str:
    """How many inputs, and under which name where that is another one."""
    names = {info.name for _, info in tensor.inputs} - {tensor.output.name}
    return count(len(tensor.inputs), "input") + (f" ({', '.join(map(printable, sorted(names)))})" if names else "")


def _parameters(tensor) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in tensor.parameters.items() if value is not None) or "copied"


def _short(value) -> str:
    if isinstance(value, tuple):
        # The same for every model is said once.
        return _short(value[0]) if len(set(value)) == 1 else "(" + ", ".join(map(_short, value)) + ")"
    return number(value) if isinstance(value, float) else str(value)
