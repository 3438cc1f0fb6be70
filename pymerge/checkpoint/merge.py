"""`pymerge.merge`: checkpoints on disk to a checkpoint on disk."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from ..recipe.schema import Recipe
from .adapter_recipe import is_adapter_recipe, merge_adapter_recipe
from .beside import card_of, extra_files
from .budget import default_memory
from .device import Device, choose_device
from .failures import DeviceError, MergeError
from .format import CheckpointError, InputChangedError
from .inputs import Hashes, InputFiles
from .many import plan_merges
from .memory import Schedule
from .merger import TensorMerger
from .meter import Meter
from .notes import add_note
from .pipeline import run
from .plan import Plan
from .provenance import FILE_NAME, provenance
from .resume import describe
from .sizes import parse_bytes
from .target import is_file_target
from .writer import CheckpointWriter

__all__ = ["DeviceError", "MergeError", "MergeReport", "merge", "run_plan", "usable_schedule"]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: folder or file that was written.
        files: everything in it, in the order written.
        tensors: how many were written.
        resumed: how many of them an earlier run had done already.
        bytes_read, bytes_written: of tensors, by this run; what is read in two passes counts twice.
        seconds: from the start of reading to the final rename.
        warnings: what looked like a mistake in the recipe.
    """

    out: Path
    files: tuple[Path, ...]
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]
    resumed: int = 0


def merge(
    recipe: str | os.PathLike | Mapping | Recipe,
    out: str | os.PathLike,
    *,
    shard_size: int | str = "5GB",
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    dtype: str | torch.dtype | None = None,
    out_dtype: str | torch.dtype | None = None,
    check_finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    seed: int | None = None,
    memory: int | str | None = None,
    device: torch.device | str | None = None,
    device_memory: int | str | None = None,
    download: bool = False,
) -> MergeReport:
    """Merge checkpoints on disk as a recipe says, tensor by tensor.

    Memory stays within a budget, whatever the size of the models and of their tensors. The result appears at `out` complete or not at all.
    The same recipe and models give the same files, byte for byte, for any number of threads, any budget and device, at any place, resumed
    or not.
    A file with several recipes is merged into folders of their names in `out`; what is there already is not merged again.

    What ended a merge decides what becomes of the work: after an interrupt, a full disk or a read error the tensors that are done stay in
    ``OUT.partial`` (the exception has a note that says so) for `resume`; after an error that would come again, or when an input has
    changed, nothing stays.

    Args:
        recipe: a YAML or JSON file in mergekit's format, or a mapping of the same form. Relative paths of models are looked up in the
            recipe's folder first, then in the current one.
        out: folder to make; or a .safetensors file, then without config, tokenizer and model card.
        shard_size: bytes of tensors per file, or "5GB"; a larger tensor has a file of its own.
        force: replace an existing `out`, once the new one is complete, and throw away an unfinished one.
        resume: continue where a merge of the same recipe and models into `out` was interrupted; from the beginning if there was none.
        verify: record the SHA-256 of every input file in pymerge.json, and compare it with what is known: with an earlier run's that this
            one continues, and with the names of files in the Hugging Face cache. Reads every file once more, beside the merge.
        dtype, out_dtype: override the recipe's.
        check_finite: refuse NaN and Inf in an input, and overflow of the result where its dtype is narrow.
        progress: called as ``progress(bytes_done, bytes_total)`` while merging.
        threads: that compute (by default torch's number) and that read files (by default one per CPU, at most 4).
        seed: overrides the recipe's, for methods that drop at random.
        memory: budget in bytes, or "2GB", for tensors on their way and what methods gather about them; at least 64 MiB, by default 4 GB, a
            quarter of the machine's memory or a quarter of what a container's limit leaves, whichever is the least. Python and torch take
            about 300 MB besides. Tensors that do not fit are merged in slices; a method that knows none (one of your own, say) gets them
            whole all the same, with a warning.
        device: a GPU to merge on ("cuda", "cuda:1"); by default the CPU. Tensors are read into pinned memory, and copied there and back
            while others are merged.
        device_memory: budget on the device, for the same; by default as much as `memory`, but no more than nine tenths of what is free.
        download: fetch models that the recipe names by hub id and that are not in the Hugging Face cache.

    Returns:
        What was done; for several recipes, for the last of them.

    Raises:
        ValueError: there is no such device, or it has not as much memory free; nothing was read or written.
        RecipeError: the recipe, the models' headers or `out` do not allow the merge; lists everything that is wrong. No tensor was read.
        CheckpointError: a file ended while it was read, or cannot be read.
        InputChangedError: an input is no longer what it was when the merge began; a CheckpointError.
        ResumeError: an unfinished merge is of another recipe, of other inputs or by another version of pymerge.
        OutputInUseError: another process is writing to `out`; an OSError.
        NonFiniteError: an input has a NaN or an infinity.
        MergeError: the method failed, a result overflowed, or integer tensors differ; a method or recipe that is for the CPU only.
        DeviceError: the device failed or has too little memory; a MergeError.
        OSError: writing failed.
    """
    budget = None if memory is None else parse_bytes(memory)
    chosen = choose_device(device, None if device_memory is None else parse_bytes(device_memory), budget)
    if is_adapter_recipe(recipe):
        if chosen is not None:
            raise MergeError("adapters are merged with each other on the CPU only; leave --device (device=) out")
        return merge_adapter_recipe(recipe, out, dtype=_text(out_dtype) or _text(dtype), seed=seed, force=force, progress=progress)
    options = {"shard_size": parse_bytes(shard_size), "dtype": _text(dtype), "out_dtype": _text(out_dtype), "seed": seed}
    report = None
    for place, plan in plan_merges(recipe, out, force=force, resume=resume, download=download, **options):
        if plan is None:
            report = MergeReport(place, tuple(sorted(place.iterdir())), 0, 0, 0, 0.0, ())
            continue
        with plan:
            report = run_plan(
                plan, place, force=force, resume=resume, verify=verify, check_finite=check_finite, progress=progress, threads=threads,
                memory=budget, device=chosen,
            )  # fmt: skip
    return report


def _text(dtype: str | torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype)


def usable_schedule(plan: Plan, memory: int | None, device: Device | None = None) -> Schedule:
    """The schedule of a plan, when this machine, the environment's settings and the budget allow it.

    Raises:
        MergeError: they do not.
    """
    try:
        ops.require_backend(torch.device("cpu") if device is None else device.device)
        return plan.schedule(memory, device=device)
    except (ImportError, ValueError) as error:
        raise MergeError(str(error)) from error


def run_plan(
    plan: Plan,
    out: str | os.PathLike,
    *,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    check_finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    memory: int | None = None,
    device: Device | None = None,
    meter: Meter | None = None,
) -> MergeReport:
    """Carry out a plan made for `out`; arguments and errors as :func:`merge` has them. `meter` is told what each stage does."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least one has to read")
    memory = default_memory() if memory is None else memory  # once: what is left in a container may change
    usable_schedule(plan, memory, device)
    began = time.perf_counter()
    out = Path(out).absolute()
    single = is_file_target(out)
    extras = {} if single else extra_files(plan)
    inputs = InputFiles(plan.checkpoints)
    with CheckpointWriter(out, plan.layout, force=force, resume=resume, description=describe(plan, inputs, extras)) as writer:
        resumed = len(writer.done)
        left = dataclasses.replace(plan, tensors=tuple(t for t in plan.tensors if t.output.name not in writer.done))
        schedule = plan.schedule(memory, done=writer.done, device=device)
        if not writer.committed:
            try:
                with _compute_threads(threads):
                    digests = _fill(writer, plan, left, schedule, inputs, verify, check_finite, progress, threads, meter or Meter())
                inputs.check()
                if not single:
                    extras[FILE_NAME] = provenance(plan, digests)
                    extras["README.md"] = card_of(plan, "config.json" in extras, digests)
                    for name, content in extras.items():
                        writer.add_file(name, content)
                writer.commit()
            except BaseException as error:
                if _worth_resuming(error, inputs):
                    kept = writer.keep()
                    if kept is not None:
                        add_note(error, kept)
                else:
                    writer.discard()
                raise
    names = [shard.file_name for shard in plan.layout.shards]
    if plan.layout.index is not None:
        names.append("model.safetensors.index.json")
    files = (out,) if single else tuple(out / name for name in [*names, *extras])
    written = sum(tensor.output.nbytes for tensor in left.tensors)
    warnings = (*plan.warnings, *schedule.warnings, *writer.warnings)
    return MergeReport(out, files, len(plan.tensors), schedule.bytes_read, written, time.perf_counter() - began, warnings, resumed)


def _fill(writer, plan, left, schedule, inputs, verify, check_finite, progress, threads, meter) -> dict[Path, str]:
    """Merge the tensors that are `left` of a plan, as `schedule` has it; the SHA-256 of the inputs, if they are wanted."""
    to_write = sum(tensor.output.nbytes for tensor in left.tensors)
    done = meter.before = plan.bytes_read + plan.bytes_written - left.bytes_read - to_write
    total = done + schedule.bytes_read + to_write

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)  # the count is of aligned pieces
        if progress is not None:
            progress(done, total)

    known = {file: digest for record in writer.records for file, digest in record.get("sha256", {}).items()}
    files = inputs.identities if verify else ()
    with Hashes(files, known, lambda file, digest: writer.record(sha256={file: digest})) as hashes:
        run(schedule, plan.checkpoints, writer, TensorMerger(plan, check_finite), threads or min(4, os.cpu_count() or 1), advance, meter)
        return hashes.result()


def _worth_resuming(error: BaseException, inputs: InputFiles) -> bool:
    """Whether what stopped a merge may be gone the next time; a tensor that cannot be merged, or an input that is another now, stays."""
    if not isinstance(error, (KeyboardInterrupt, SystemExit, OSError, MemoryError, CheckpointError, DeviceError)):
        return False
    try:
        inputs.check()
    except CheckpointError:
        return False
    return not isinstance(error, InputChangedError)


@contextmanager
def _compute_threads(count: int | None):
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
