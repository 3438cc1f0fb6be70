"""`pymerge.verify`: does an output hold what its recipe gives? Tensors are merged once more from the inputs and compared bit for bit."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import ops
from ..recipe.source import Source, parse_text
from .device import choose_device
from .failures import MergeError
from .format import CheckpointError, TensorInfo
from .lora.adapter import is_adapter
from .merger import TensorMerger
from .pipeline import run
from .plan import Plan, make_plan
from .provenance import Provenance, read_provenance
from .reader import Checkpoint, open_checkpoint
from .verify_report import VerifyReport, files_differ

if TYPE_CHECKING:
    from .layout import OutputTensor

__all__ = ["VerifyReport", "verify"]

SAMPLE = 32
BLOCK = 2**24


def verify(
    out: str | os.PathLike,
    *,
    folder: str | os.PathLike | None = None,
    sample: int | None = SAMPLE,
    seed: int = 0,
    check_finite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    device: torch.device | str | None = None,
) -> VerifyReport:
    """Merge tensors of an output once more, from the inputs that it names, and compare them with what it holds. Writes nothing.

    Args:
        out: folder or file that a merge wrote; or an adapter that :func:`pymerge.merge_adapters` or :func:`pymerge.extract_lora` wrote, of
            which a sample is of modules. Another machine may round the last bits of their SVDs in another way.
        folder: that relative paths in its recipe start from, where the recipe lay; by default the current one. What is not there is looked
            for beside `out`.
        sample: how many tensors to check, chosen at random; None for all, and then files whose SHA-256 is recorded are hashed too. Names,
            dtypes, shapes and the sizes of the input files are always compared.
        seed: of the choice.
        check_finite: end with an error at a NaN or an infinity in an input.
        progress: called as ``progress(bytes_done, bytes_total)``.
        threads: that read.
        device: a GPU to merge on, whatever `out` was merged on; by default the CPU.

    Raises:
        ValueError: there is no such device.
        CheckpointError: `out` is no checkpoint, is malformed, or does not say how it was made.
        RecipeError: its recipe cannot be carried out, for example because a model is not there any more.
        MergeError: its method is for the CPU only.
        DeviceError: the device failed or has too little memory; a MergeError.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample is {sample}; at least one tensor has to be checked")
    place = choose_device(device, None, None)
    if is_adapter(out):
        from .lora.verify import verify_adapter

        return verify_adapter(Path(out), folder=None if folder is None else Path(folder), sample=sample, seed=seed, progress=progress)
    ops.require_backend(torch.device("cpu") if place is None else place.device)
    with open_checkpoint(out) as output:
        origin = read_provenance(output)
        named = _results(origin, Path(out), Path(folder or "."))
        with make_plan(_source(origin, folder), named=named) as plan:
            differences = dict(_headers_differ(plan, output))
            wrong_inputs = _inputs_differ(plan, origin, sample is None)
            comparable = [t for t in plan.tensors if t.output.name not in differences]
            chosen = comparable if sample is None or sample >= len(comparable) else random.Random(seed).sample(comparable, sample)
            names = {tensor.output.name for tensor in chosen}
            part = dataclasses.replace(plan, tensors=tuple(t for t in plan.tensors if t.output.name in names))
            comparer = _Comparer(output)
            try:
                schedule = plan.schedule(done={t.output.name for t in plan.tensors} - names, device=place)
            except ValueError as error:
                raise MergeError(str(error)) from error
            total, done = schedule.bytes_read + sum(t.output.nbytes for t in part.tensors), 0

            def advance(count: int) -> None:
                nonlocal done
                done = min(done + count, total)
                if progress is not None:
                    progress(done, total)

            run(schedule, plan.checkpoints, comparer, TensorMerger(plan, check_finite), threads or min(4, os.cpu_count() or 1), advance)
            differences.update(comparer.differences)
            ordered = [t.output.name for t in plan.tensors if t.output.name in differences]
            ordered += [name for name in differences if name not in set(ordered)]
            checked = tuple(t.output.name for t in part.tensors)
            found = tuple((name, differences[name]) for name in ordered)
            return VerifyReport(Path(out), len(output.tensors), checked, found, tuple(wrong_inputs), origin.version)


def _source(origin: Provenance, folder: str | os.PathLike | None) -> Source:
    """The recipe that an output names, as untrusted as a recipe's file."""
    sources = parse_text(origin.recipe, f"{origin.source} (its recipe)", None if folder is None else Path(folder))
    if len(sources) != 1:
        raise CheckpointError(f"{origin.source}: holds {len(sources)} recipes, where one was expected")
    return sources[0]


def _results(origin: Provenance, out: Path, folder: Path) -> dict[str, Path]:
    """Models that lie beside the output, such as the results of other recipes of the same file."""
    beside = {model: out.absolute().parent / model for model, _ in origin.inputs if Path(model).name == model}
    return {model: path for model, path in beside.items() if path.exists() and not (folder / model).exists()}


def _headers_differ(plan: Plan, output: Checkpoint) -> list[tuple[str, str]]:
    expected: dict[str, OutputTensor] = {tensor.output.name: tensor.output for tensor in plan.tensors}
    found = []
    for name, tensor in expected.items():
        info = output.tensors.get(name)
        if info is None:
            found.append((name, "is missing"))
        elif (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            found.append((name, f"is {info.dtype} {list(info.shape)}, the recipe gives {tensor.dtype} {list(tensor.shape)}"))
    return found + [(name, "is not in the recipe's result") for name in output.tensors if name not in expected]


def _inputs_differ(plan: Plan, origin: Provenance, hashes: bool) -> list[str]:
    found = []
    stores = dict(zip(plan.names, plan.checkpoints, strict=True))
    for model, files in origin.inputs:
        if model not in stores:
            found.append(f"{model}: was an input, and is not one now")
            continue
        found += files_differ(model, files, stores[model].files, hashes)
    return found


class _Comparer:
    """Takes what a merge gives where a writer would, and compares it with what is there."""

    def __init__(self, output: Checkpoint) -> None:
        self.differences: dict[str, str] = {}
        self._output = output
        self._block = memoryview(bytearray(BLOCK))

    def write(self, name: str, data: memoryview, start: int = 0) -> None:
        info = self._output.tensors[name]
        for begin in range(0, len(data), BLOCK):
            expected = data[begin : begin + BLOCK]
            got = self._block[: len(expected)]
            self._output.read_into(info, got, start + begin)
            if got != expected and name not in self.differences:
                self.differences[name] = _first_difference(got, expected, info, start + begin)


def _first_difference(got: memoryview, expected: memoryview, info: TensorInfo, start: int) -> str:
    a, b = (torch.frombuffer(x, dtype=torch.uint8) for x in (got, expected))
    wrong = (a != b).nonzero()
    itemsize = max(1, info.nbytes // max(1, info.numel))
    position = start + int(wrong[0])
    return f"differs from byte {position} (element {position // itemsize}) on"
