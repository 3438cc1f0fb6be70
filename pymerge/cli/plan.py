"""`pymerge plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ..checkpoint.sizes import format_bytes
from .errors import REFUSED, exits_with
from .options import Size, as_json, budget_options, chosen_device, device_as_dict, merge_options
from .text import count, heading, number, print_json, printable, table

__all__ = ["command"]

WORKSPACE = 350_000_000
"""Bytes that Python, torch and the method's own scratch space take besides the buffers; measured, rounded up."""


@click.command("plan", short_help="Check a recipe and show what it would do.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@merge_options
@budget_options
@click.option("--write-rate", type=Size(), metavar="SIZE", help="Assume that so much is written in a second; by default 500MB.")
@click.option("-v", "--verbose", "-t", "--tensors", "verbose", is_flag=True, help="List every tensor with its parameters.")
@as_json
def command(recipe, out, memory, device, device_memory, write_rate, verbose, as_json, **options) -> None:
    """Check RECIPE against the models it names, and OUT if given; show what would be read, merged and written, and what that takes.

    Writes nothing. Reads headers, and up to 128 MB of tensors for the estimate of the time. Of several recipes in one file all are
    planned, also those that use results of others. Exits with 2 and lists every problem when the merge could not be done.
    """
    from ..checkpoint.adapter_recipe import is_adapter_recipe

    chosen = chosen_device(device, device_memory, memory)
    if is_adapter_recipe(recipe):
        if chosen is not None:
            raise click.UsageError("adapters are merged with each other on the CPU only; leave --device out")
        _plan_adapters(recipe, out, as_json, options)
        return
    from ..checkpoint.budget import default_memory
    from ..checkpoint.estimate import WRITE_RATE, estimate
    from ..checkpoint.many import plan_all
    from ..checkpoint.merge import usable_schedule

    with plan_all(recipe, out, **options) as merges:
        to_do = [merge for merge in merges if not merge.there]
        memory = default_memory() if memory is None else memory
        with exits_with(REFUSED):
            schedules = [usable_schedule(merge.plan, memory, chosen) for merge in to_do]
            guess = estimate(to_do, memory, write_rate or WRITE_RATE, chosen)
        memory_bytes = WORKSPACE + max((schedule.buffers.total for schedule in schedules), default=0)
        if as_json:
            content = {
                "merges": [_as_dict(*pair, verbose) for pair in zip(to_do, schedules, strict=True)],
                "there_already": [str(merge.place) for merge in merges if merge.there],
                "memory_bytes": memory_bytes,
                "estimate": dataclasses.asdict(guess),
            }
            print_json("plan/2", content)
            return
        for merge in merges:
            if len(merges) > 1:
                click.echo(heading(f"{merge.name}{' (is there already)' if merge.there else ''}"))
            if not merge.there:
                _print(merge.plan, schedules[to_do.index(merge)], verbose)
            if len(merges) > 1:
                click.echo("")
        if to_do:
            _print_total(guess, memory_bytes)
        else:
            click.echo("nothing to do: every result is there")
        if out is None:
            click.echo(f"\nto do it: pymerge merge {recipe} OUT")


def _plan_adapters(recipe: Path, out: Path | None, as_json: bool, options: dict) -> None:
    """Of a recipe of adapters: what would be merged. The time is that of the SVDs and is not estimated."""
    from ..checkpoint.adapter_recipe import adapters_planned

    asked = options["out_dtype"] or options["dtype"]
    with exits_with(REFUSED), adapters_planned(recipe, out, dtype=asked, seed=options["seed"], force=options["force"]) as job:
        ranks = [sorted({change.rank for change in adapter.modules.values()}) for adapter in job.adapters]
        nbytes = sum(adapter.store.nbytes for adapter in job.adapters)
        if as_json:
            models = [
                {"name": str(a.path), "path": str(a.path), "role": "adapter", "bytes": a.store.nbytes, "ranks": own}
                for a, own in zip(job.adapters, ranks, strict=True)
            ]
            content = {"out": None if out is None else str(out), "merge_method": job.name, "models": models, "modules": len(job.names)}
            print_json("plan/2", {"adapter": {**content, "bytes_read": nbytes, "warnings": list(job.warnings)}})
            return
        for warning in job.warnings:
            click.echo(f"warning: {warning}", err=True)
        click.echo(f"method   {job.describe()}")
        for adapter, own in zip(job.adapters, ranks, strict=True):
            each = f"rank{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
            click.echo(f"adapter  {adapter.path}  ({count(len(adapter.modules), 'module')}, {each}, {format_bytes(adapter.store.nbytes)})")
        click.echo(f"merge    {count(len(job.names), 'module')} into a new adapter")
        click.echo(f"read     {format_bytes(nbytes)}")
    if out is None:
        click.echo(f"\nto do it: pymerge merge {recipe} OUT")


def _as_dict(merge, schedule, tensors: bool) -> dict:
    plan = merge.plan
    result = {
        "name": merge.name,
        "out": None if merge.place is None else str(merge.place),
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
        "config_from": None if plan.donor is None else str(_donor(plan)),
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


def _donor(plan) -> Path:
    """The folder that the config comes from; of a result that is not there yet the one where it will be."""
    return next((s.path for s in plan.checkpoints if s.folder == plan.donor and not s.files), plan.donor)


def _print(plan, schedule, tensors: bool) -> None:
    for warning in (*plan.warnings, *schedule.warnings):
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"method   {plan.method.name}: {plan.method.summary}")
    for name, role, index in _inputs(plan):
        checkpoint = plan.checkpoints[index]
        sizes = f"{count(len(checkpoint.tensors), 'tensor')}, {format_bytes(checkpoint.nbytes)}"
        sizes += f" in {count(len(checkpoint.files), 'file')}" if checkpoint.files else ", not merged yet"
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
    if schedule.device is not None:
        device, buffers = schedule.device, schedule.device_buffers.total
        memory = f"at most {format_bytes(device.memory)}, of which {format_bytes(buffers)} for tensors on their way"
        click.echo(f"device   {device.title}, by {device.backend}: {memory}")
    if plan.donor:
        click.echo(f"copy     config and tokenizer of {_donor(plan)}")
    if tensors:
        click.echo("")
        table(
            ["tensor", "dtype", "shape", "from", "parameters"],
            [[t.output.name, t.output.dtype, str(list(t.output.shape)), _origin(plan, t), _parameters(t)] for t in plan.tensors],
            left=5,
        )


def _print_total(guess, memory_bytes: int) -> None:
    click.echo(f"memory   about {format_bytes(memory_bytes)}, of which {format_bytes(memory_bytes - WORKSPACE)} for tensors on their way")
    if guess.seconds is None:
        return
    passes = f" in up to {guess.passes} passes" if guess.passes > 1 else ""
    reading = f"reading {format_bytes(guess.bytes_read)}{passes} at {format_bytes(guess.read_rate)}/s"
    writing = f"writing {format_bytes(guess.bytes_written)} at {format_bytes(guess.write_rate)}/s"
    click.echo(f"time     {_duration(guess.seconds)}: {reading}, {writing}; merging at {format_bytes(guess.merge_rate)}/s beside it")
    click.echo(f"         measured on {format_bytes(guess.sampled)} just now, but for writing, whose rate is assumed (--write-rate)")


def _duration(seconds: float) -> str:
    if seconds < 0.1:
        return "less than 0.1 s"
    if seconds < 99.5:
        return f"about {seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 100 else f"about {minutes // 60} h {minutes % 60} min"


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
