"""`pymerge.merge`: checkpoints on disk to a checkpoint on disk."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..finite import NonFiniteError
from ..recipe.schema import Recipe
from . import dtypes
from .adapter_recipe import is_adapter_recipe, merge_adapter_recipe
from .extras import config_with_dtype, files_to_copy, model_card, read_small
from .many import plan_merges
from .pipeline import Starts, run
from .plan import Plan, TensorPlan
from .settings import is_built_in
from .sizes import parse_bytes
from .writer import CheckpointWriter, is_file_target

__all__ = ["MergeError", "MergeReport", "merge", "run_plan"]

NARROW = ("F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Types whose largest number is small enough for sums of weights to overflow."""


class MergeError(RuntimeError):
    """A merge failed after it had begun. Nothing was left at the output's name."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: folder or file that was written.
        files: everything in it, in the order written.
        tensors: how many were written.
        bytes_read, bytes_written: of tensors.
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
    download: bool = False,
) -> MergeReport:
    """Merge checkpoints on disk as a recipe says, tensor by tensor.

    Memory stays near the largest tensor of each model, counted once, plus at most 200 MB on the way, whatever the size of the models.
    When all models are LoRA adapters, the result is an adapter, see :func:`pymerge.merge_adapters`.

    The result appears at `out` complete or not at all. The same recipe and models give the same bytes, for any number of threads.
    A file with several recipes is merged into folders of their names in `out`; what is there already is not merged again.

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
        download: fetch models that the recipe names by hub id and that are not in the Hugging Face cache.

    Returns:
        What was done; for several recipes, for the last of them.

    Raises:
        RecipeError: the recipe, the models' headers or `out` do not allow the merge; lists everything that is wrong. No tensor was read.
        CheckpointError: a file changed or ended while it was read.
        NonFiniteError: an input has a NaN or an infinity.
        MergeError: the method failed, a result overflowed, or integer tensors differ.
        OSError: writing failed.
    """
    if is_adapter_recipe(recipe):
        return merge_adapter_recipe(recipe, out, dtype=_text(out_dtype) or _text(dtype), seed=seed, force=force)
    options = {"shard_size": parse_bytes(shard_size), "dtype": _text(dtype), "out_dtype": _text(out_dtype), "seed": seed}
    report = None
    for place, plan in plan_merges(recipe, out, force=force, download=download, **options):
        if plan is None:
            report = MergeReport(place, tuple(sorted(place.iterdir())), 0, 0, 0, 0.0, ())
            continue
        with plan:
            report = run_plan(plan, place, force=force, check_finite=check_finite, progress=progress, threads=threads)
    return report


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
) -> MergeReport:
    """Carry out a plan made for `out`; arguments and errors as :func:`merge` has them."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least one has to read")
    try:
        ops.require_backend(torch.device("cpu"))
    except (ImportError, ValueError) as error:
        raise MergeError(str(error)) from error
    began = time.perf_counter()
    out = Path(out).absolute()
    total, done = plan.bytes_read + plan.bytes_written, 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)  # the count is of aligned pieces
        if progress is not None:
            progress(done, total)

    extras = {} if is_file_target(out) else _extra_files(plan, out.name)
    merger = _TensorMerger(plan, check_finite)
    with CheckpointWriter(out, plan.layout, force=force) as writer:
        for name, content in extras.items():
            writer.add_file(name, content)
        with _compute_threads(threads):
            run(plan, writer, merger.merge, threads or min(4, os.cpu_count() or 1), advance)
        writer.commit()
    names = [shard.file_name for shard in plan.layout.shards]
    if plan.layout.index is not None:
        names.append("model.safetensors.index.json")
    files = (out,) if is_file_target(out) else tuple(out / name for name in [*names, *extras])
    seconds = time.perf_counter() - began
    return MergeReport(out, files, len(plan.tensors), plan.bytes_read, plan.bytes_written, seconds, plan.warnings)


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
    if plan.alignment is not None:
        content = plan.alignment.replace(content)
    plan.changes.apply(content)
    if "config.json" in content:
        content["config.json"] = config_with_dtype(content["config.json"], _main_dtype(plan))
    models = [name for i, name in enumerate(plan.names) if i not in plan.bases]
    base = str(plan.recipe.base_model) if plan.recipe.base_model else None
    content["README.md"] = model_card(plan.recipe, title, models, base, "config.json" in content).encode()
    return content


def _main_dtype(plan: Plan) -> str:
    """The dtype of most of the output's bytes."""
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        if not tensor.copied:
            sizes[tensor.output.dtype] = sizes.get(tensor.output.dtype, 0) + tensor.output.nbytes
    return max(sizes, key=lambda code: (sizes[code], code)) if sizes else "F32"


class _TensorMerger:
    """Merges one tensor after another in the pipeline's memory."""

    def __init__(self, plan: Plan, check_finite: bool) -> None:
        self._plan = plan
        self._check_finite = check_finite
        # Our own methods compute in fp32 whatever the storage, so widening to fp32 first would only take memory. Others may not.
        self._widens = is_built_in(plan.method)

    def merge(self, tensor: TensorPlan, source: memoryview, starts: Starts, target: memoryview, position: int) -> None:
        """See :func:`pymerge.checkpoint.pipeline.run`."""
        output = tensor.output
        out = _bytes(target, position, output.nbytes)
        pieces = [_bytes(source, starts[index, info.name], info.nbytes) for index, info in tensor.inputs]
        if tensor.copied:
            self._copy(tensor, pieces, out)
            return
        inputs = [
            piece.view(dtypes.torch_dtype(info.dtype)).view(info.shape) for piece, (_, info) in zip(pieces, tensor.inputs, strict=True)
        ]
        result = out.view(dtypes.torch_dtype(output.dtype)).view(output.shape)
        inputs = [self._cast(x) for x in inputs]
        base, models = (inputs[0], inputs[1:]) if tensor.has_base else (None, inputs)
        with self._explained(tensor):
            got = self._plan.method.tensor(
                base, models, name=output.name, dtype=result.dtype, out=result, check_finite=self._check_finite, **tensor.parameters
            )
            if got is not result:
                if got.shape != result.shape:
                    raise ValueError(f"returned shape {list(got.shape)} for tensors of shape {list(result.shape)}")
                result.copy_(got)
        if self._check_finite and output.dtype in NARROW and not torch.isfinite(result.float()).all():
            raise MergeError(
                f"{output.name!r}: the merged values overflow {dtypes.name_of(output.dtype)}; choose another out_dtype, such as bfloat16"
            )

    def _cast(self, x: Tensor) -> Tensor:
        code = self._plan.recipe.dtype
        if code is None or (self._widens and code == "F32" and x.dtype in (torch.bfloat16, torch.float16)):
            return x
        return x.to(dtypes.torch_dtype(code))

    def _copy(self, tensor: TensorPlan, pieces: list[Tensor], out: Tensor) -> None:
        for i, piece in enumerate(pieces[1:], 1):
            if not torch.equal(pieces[0], piece):
                first, other = (self._plan.names[tensor.inputs[k][0]] for k in (0, i))
                raise MergeError(
                    f"{tensor.output.name!r} is of dtype {tensor.output.dtype}, which cannot be merged, "
                    f"and differs between {first} and {other}"
                )
        out.copy_(pieces[0])

    @contextmanager
    def _explained(self, tensor: TensorPlan):
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(self._with_model_name(str(error), tensor)) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise MergeError(f"{tensor.output.name!r}: there is not enough memory to merge it") from None
        except (ValueError, TypeError, RuntimeError) as error:
            raise MergeError(f"{tensor.output.name!r}: {self._plan.method.name!r} failed: {error}") from error

    def _with_model_name(self, message: str, tensor: TensorPlan) -> str:
        """Methods say "base" and "model 1"; people know their models by path."""
        match = re.match(r"(?:(base)|model (\d+)): ", message)
        if not match:
            return message
        which = 0 if match.group(1) else int(match.group(2)) + tensor.has_base
        index, info = tensor.inputs[which]
        code = self._plan.recipe.dtype
        cast = f" (after the recipe's dtype turned it from {info.dtype} into {code})" if code not in (None, info.dtype) else ""
        return f"{self._plan.checkpoints[index].path}: {message[match.end() :]}{cast}"


def _bytes(memory: memoryview, start: int, nbytes: int) -> Tensor:
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)
