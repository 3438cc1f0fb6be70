"""`pymerge.merge`: checkpoints on disk to a checkpoint on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from ..recipe.schema import Recipe
from .extras import config_with_dtype, files_to_copy, model_card, read_small
from .merger import MergeError, TensorMerger
from .pipeline import run
from .plan import Plan, make_plan
from .sizes import parse_bytes
from .writer import CheckpointWriter, is_file_target

__all__ = ["MergeError", "MergeReport", "merge", "run_plan"]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: folder or file that was written.
        files: everything in it, in the order written.
        tensors: how many were written.
        bytes_read, bytes_written: of tensors; those that are read in two passes count twice.
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


def merge(
    recipe: str | os.PathLike | Mapping | Recipe,
    out: str | os.PathLike,
    *,
    shard_size: int | str = "5GB",
    force: bool = False,
    dtype: str | torch.dtype | None = None,
    out_dtype: str | torch.dtype | None = None,
    check_finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    seed: int | None = None,
    memory: int | str | None = None,
) -> MergeReport:
    """Merge checkpoints on disk as a recipe says, tensor by tensor.

    Memory stays within a budget, whatever the size of the models and of their tensors. The result appears at `out` complete or not at all.
    The same recipe and models give the same bytes, for any number of threads and any budget.

    Args:
        recipe: a YAML or JSON file in mergekit's format, or a mapping of the same form. Relative paths of models are looked up in the
            recipe's folder first, then in the current one.
        out: folder to make; or a .safetensors file, then without config, tokenizer and model card.
        shard_size: bytes of tensors per file, or "5GB"; a larger tensor has a file of its own.
        force: replace an existing `out`, once the new one is complete.
        dtype, out_dtype: override the recipe's.
        check_finite: refuse NaN and Inf in an input, and overflow of the result where its dtype is narrow.
        progress: called as ``progress(bytes_done, bytes_total)`` while merging.
        threads: that compute (by default torch's number) and that read files (by default one per CPU, at most 4).
        seed: overrides the recipe's, for methods that drop at random.
        memory: budget in bytes, or "2GB", for tensors on their way and what methods gather about them; at least 64 MiB, by default 4 GB or
            a quarter of the machine's memory, whichever is less. Python and torch take about 300 MB besides. Tensors that do not fit are
            merged in slices; a method that knows none (one of your own, say) gets them whole all the same, with a warning.

    Raises:
        RecipeError: the recipe, the models' headers or `out` do not allow the merge; lists everything that is wrong. No tensor was read.
        CheckpointError: a file changed or ended while it was read.
        NonFiniteError: an input has a NaN or an infinity.
        MergeError: the method failed, a result overflowed, or integer tensors differ.
        OSError: writing failed.
    """
    plan = make_plan(
        recipe, out, shard_size=parse_bytes(shard_size), force=force, dtype=_text(dtype), out_dtype=_text(out_dtype), seed=seed
    )
    with plan:
        return run_plan(
            plan,
            out,
            force=force,
            check_finite=check_finite,
            progress=progress,
            threads=threads,
            memory=None if memory is None else parse_bytes(memory),
        )


def _text(dtype: str | torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype)


def run_plan(
    plan: Plan,
    out: str | os.PathLike,
    *,
    force: bool = False,
    check_finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    memory: int | None = None,
) -> MergeReport:
    """Carry out a plan made for `out`; arguments and errors as :func:`merge` has them."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least one has to read")
    try:
        ops.require_backend(torch.device("cpu"))
        schedule = plan.schedule(memory)
    except (ImportError, ValueError) as error:
        raise MergeError(str(error)) from error
    began = time.perf_counter()
    out = Path(out).absolute()
    total, done = schedule.bytes_read + plan.bytes_written, 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)  # the count is of aligned pieces
        if progress is not None:
            progress(done, total)

    extras = {} if is_file_target(out) else _extra_files(plan, out.name)
    merger = TensorMerger(plan, check_finite)
    with CheckpointWriter(out, plan.layout, force=force) as writer:
        for name, content in extras.items():
            writer.add_file(name, content)
        with _compute_threads(threads):
            run(schedule, plan.checkpoints, writer, merger, threads or min(4, os.cpu_count() or 1), advance)
        writer.commit()
    names = [shard.file_name for shard in plan.layout.shards]
    if plan.layout.index is not None:
        names.append("model.safetensors.index.json")
    files = (out,) if is_file_target(out) else tuple(out / name for name in [*names, *extras])
    seconds = time.perf_counter() - began
    return MergeReport(out, files, len(plan.tensors), schedule.bytes_read, plan.bytes_written, seconds, plan.warnings + schedule.warnings)


@contextmanager
def _compute_threads(count: int | None):
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _extra_files(plan: Plan, title: str) -> dict[str, bytes]:
    content = {path.name: read_small(path) for path in files_to_copy(plan.donor)}
    if "config.json" in content:
        content["config.json"] = config_with_dtype(content["config.json"], _main_dtype(plan))
    models = [name for i, name in enumerate(plan.names) if i not in plan.bases]
    content["README.md"] = model_card(plan.recipe, title, models, plan.recipe.base_model, "config.json" in content).encode()
    return content


def _main_dtype(plan: Plan) -> str:
    """The dtype of most of the output's bytes."""
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        if not tensor.copied:
            sizes[tensor.output.dtype] = sizes.get(tensor.output.dtype, 0) + tensor.output.nbytes
    return max(sizes, key=lambda code: (sizes[code], code)) if sizes else "F32"
