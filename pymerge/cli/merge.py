"""`pymerge merge`."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from ..checkpoint.meter import Meter
from ..checkpoint.sizes import format_bytes
from .errors import REFUSED, exits_with
from .options import as_json, budget_options, chosen_device, device_as_dict, merge_options
from .text import count, print_json

__all__ = ["command"]

NOT_FOR_ADAPTERS = ("resume", "shard_size", "threads", "memory", "download", "no_check_finite")


@click.command("merge", short_help="Merge checkpoints by a recipe.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@merge_options
@click.option("--resume", is_flag=True, help="Continue where an interrupted merge into OUT ended, if there was one.")
@click.option("--verify", is_flag=True, help="Record the inputs' SHA-256; reads them once more.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads that read and compute; by default one per CPU.")
@budget_options
@click.option("--no-check-finite", is_flag=True, help="Let NaN and infinities in inputs through.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Say what reading, merging and writing took.")
@as_json
def command(
    recipe, out, force, resume, verify, threads, memory, device, device_memory, no_check_finite, quiet, verbose, as_json, **options
) -> None:  # fmt: skip
    """Merge checkpoints as RECIPE says and write the result to OUT.

    RECIPE is a YAML or JSON file in mergekit's format. OUT is a folder to make (shards, index, config, tokenizer, README.md) or a file
    that ends in .safetensors (the weights alone).

    When all models are LoRA adapters, they are merged into a new adapter (see `pymerge lora merge`).

    Models are .safetensors files, or folders with model.safetensors or shards and an index. Relative paths are looked up in the recipe's
    folder first, then in the current one. Everything is checked before anything is read; memory stays within a budget; OUT appears
    when it is complete. Until then the work is in OUT.partial, where --resume finds it after an interrupt or a crash.
    A file with several recipes is merged into folders of their names in OUT.
    """
    from ..checkpoint.adapter_recipe import is_adapter_recipe
    from ..checkpoint.budget import default_memory
    from ..checkpoint.many import plan_merges
    from ..checkpoint.merge import run_plan, usable_schedule
    from .progress import Progress, shown

    told = not (quiet or as_json)
    chosen = chosen_device(device, device_memory, memory)
    if is_adapter_recipe(recipe):
        if chosen is not None:
            raise click.UsageError("adapters are merged with each other on the CPU only; leave --device out")
        _merge_adapters(recipe, out, options, force, quiet, told, as_json)
        return
    memory = default_memory() if memory is None else memory
    done, there = [], []
    try:
        for place, plan in plan_merges(recipe, out, force=force, resume=resume, **options):
            if plan is None:
                there.append(str(place))
                if told:
                    click.echo(f"{place}: is there already")
                continue
            meter = Meter()
            with plan:
                for warning in plan.warnings if told else ():
                    click.echo(f"warning: {warning}", err=True)
                to_read = usable_schedule(plan, memory, chosen).bytes_read
                with shown("merging", Progress(to_read + plan.bytes_written, meter), quiet):
                    report = run_plan(
                        plan, place, force=force, resume=resume, verify=verify, check_finite=not no_check_finite, threads=threads,
                        memory=memory, device=chosen, meter=meter,
                    )  # fmt: skip
            for warning in report.warnings[len(plan.warnings) :] if told else ():
                click.echo(f"warning: {warning}", err=True)
            done.append(_as_dict(plan, report, meter, chosen))
            if told:
                _print(place, plan, report, meter, verbose, chosen)
    except KeyboardInterrupt as error:
        error.__notes__ = getattr(error, "__notes__", ["nothing was kept; the same command starts over"])
        raise
    if as_json:
        print_json("merge/1", {"merges": done, "there_already": there})


def _merge_adapters(recipe, out, options: dict, force: bool, quiet: bool, told: bool, as_json: bool) -> None:
    from ..checkpoint.adapter_recipe import merge_adapter_recipe
    from ..checkpoint.format import CheckpointError
    from .progress import Progress, shown

    given = [name for name in NOT_FOR_ADAPTERS if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given and told:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        click.echo(f"warning: {names}: without effect, adapters are merged in one go", err=True)
    dtype, progress = options["out_dtype"] or options["dtype"], Progress()
    with exits_with(REFUSED, CheckpointError), shown("merging", progress, quiet):  # nothing has been written then
        report = merge_adapter_recipe(recipe, out, dtype=dtype, seed=options["seed"], force=force, progress=progress)
    for warning in report.warnings if told else ():
        click.echo(f"warning: {warning}", err=True)
    if told:
        click.echo(f"{out}: an adapter of {count(report.tensors // 2, 'module')}, {format_bytes(report.bytes_written)}")
    if as_json:
        written = {"out": str(report.out), "tensors": report.tensors, "bytes_read": report.bytes_read, "seconds": report.seconds}
        files = [{"path": str(path), "bytes": path.stat().st_size} for path in report.files]
        print_json(
            "merge/1", {"merges": [], "adapter": {**written, "files": files, "warnings": list(report.warnings)}, "there_already": []}
        )


def _print(place: Path, plan, report, meter: Meter, verbose: bool, device) -> None:
    if report.resumed:
        click.echo(f"{count(report.resumed, 'tensor')} were done before")
    moved = report.bytes_read + report.bytes_written
    click.echo(
        f"{place}: {count(report.tensors, 'tensor')}, {format_bytes(report.bytes_written)}, merged by {plan.method.name}"
        f"{f' on {device.device}' if device else ''} in {report.seconds:.1f} s ({format_bytes(moved / max(report.seconds, 1e-9))}/s)"
    )
    for stage in meter.stages if verbose else ():
        slowest = "; the others waited for it" if stage == meter.slowest() else ""
        size, seconds = format_bytes(meter.bytes[stage]), meter.seconds[stage]
        click.echo(f"  {stage}  {size} in {seconds:.2f} s ({format_bytes(meter.rate(stage))}/s){slowest}")


def _as_dict(plan, report, meter: Meter, device) -> dict:
    return {
        "out": str(report.out),
        "merge_method": plan.method.name,
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in report.files],
        "tensors": report.tensors,
        "resumed_tensors": report.resumed,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "seconds": report.seconds,
        "stages": {stage: {"bytes": meter.bytes[stage], "seconds": meter.seconds[stage]} for stage in meter.stages},
        "device": device_as_dict(device),
        "warnings": list(report.warnings),
    }
