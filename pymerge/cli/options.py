"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable

import click

from ..checkpoint.dtypes import CHOICES
from ..checkpoint.sizes import format_bytes, parse_bytes

__all__ = ["DTYPES", "Size", "as_json", "budget_options", "chosen_device", "device_as_dict", "device_option", "merge_options"]

DTYPES = CHOICES


class Size(click.ParamType):
    """A number of bytes with or without a unit."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, also for an error.")


def _enough(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None:
        from ..checkpoint.budget import LEAST_MEMORY

        if value < LEAST_MEMORY:
            raise click.BadParameter(f"{format_bytes(value)} is too small; it must be at least {format_bytes(LEAST_MEMORY)}")
    return value


_MERGE_OPTIONS = (
    click.option(
        "--shard-size", type=Size(), default="5GB", show_default=True, metavar="SIZE", help="Most bytes of tensors per file: 5GB, 512MiB."
    ),
    click.option("--dtype", type=click.Choice(DTYPES), help="Cast inputs to this first; overrides the recipe's dtype."),
    click.option("--out-dtype", type=click.Choice(DTYPES), help="Write this dtype; overrides the recipe's out_dtype."),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), metavar="N", help="Of random drops; overrides the recipe's seed."),
    click.option("--download", is_flag=True, help="Fetch models named by hub id that are not in the Hugging Face cache."),
    click.option("-f", "--force", is_flag=True, help="Replace an existing OUT, once the new one is complete."),
)


def merge_options(function: Callable) -> Callable:
    """Adds the options that decide what is merged into what."""
    for option in reversed(_MERGE_OPTIONS):
        function = option(function)
    return function


device_option = click.option(
    "--device", metavar="NAME", help="Merge on this GPU: cuda, cuda:1; by default on the CPU. The files are the same."
)

_BUDGET_OPTIONS = (
    click.option(
        "--memory",
        type=Size(),
        callback=_enough,
        metavar="SIZE",
        help="Budget for tensors on their way: 2GB; by default 4GB or a quarter of the memory that there is.",
    ),
    device_option,
    click.option(
        "--device-memory",
        type=Size(),
        metavar="SIZE",
        help="Budget on the device; by default as much as --memory, but no more than nine tenths of what is free.",
    ),
)


def budget_options(function: Callable) -> Callable:
    """Adds the options that decide where and with how much memory a merge works."""
    for option in reversed(_BUDGET_OPTIONS):
        function = option(function)
    return function


def chosen_device(device: str | None, device_memory: int | None, memory: int | None):
    """The device of these options, None for the CPU; an error of usage where there is none such."""
    if device is None and device_memory is None:
        return None
    from ..checkpoint.device import choose_device

    try:
        return choose_device(device, device_memory, memory)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def device_as_dict(device) -> dict | None:
    """A device as JSON documents have it; None for the CPU."""
    return device and {"name": str(device.device), "backend": device.backend, "memory_bytes": device.memory}
