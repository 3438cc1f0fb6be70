"""`pymerge.merge_adapters`: LoRA adapters on disk to one LoRA adapter on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import dtypes
from .inputs import InputFiles
from .lora.factoring import one_thread
from .lora.job import open_job
from .lora.record import merge_files, used_adapter
from .lora.save import check_place, save_adapter

__all__ = ["AdapterReport", "merge_adapters"]


@dataclass(frozen=True)
class AdapterReport:
    """What :func:`merge_adapters` wrote.

    Attributes:
        out: the folder.
        ranks: by module.
        kept: by module, the fraction of the squared Frobenius norm of the true merge that the written factors have; 1 is all.
        bytes_read, nbytes: of the adapters' tensors, and of those written.
        warnings: what may not be what was meant.
    """

    out: Path
    ranks: dict[str, int]
    kept: dict[str, float]
    bytes_read: int
    nbytes: int
    warnings: tuple[str, ...]


def merge_adapters(
    adapters: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    method: str = "cat",
    weights: float | Sequence[float] | None = None,
    on: Literal["products", "factors"] = "products",
    rank: int | None = None,
    energy: float | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    check_base: bool = True,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> AdapterReport:
    """Merge LoRA adapters of one base model into a new adapter, without the base.

    Each adapter changes each of its modules by ``scale_i * B_i @ A_i``, with its own rank, alpha and rsLoRA setting.

    Args:
        adapters: folders as PEFT writes them.
        out: folder to make.
        method: ``"cat"``: exactly ``sum_i weights[i] * scale_i * B_i @ A_i``; the ranks add up. ``"svd"``: the nearest change of a lower
            rank to that sum. Or any method of :func:`pymerge.methods`, applied to the products ``scale_i * B_i @ A_i`` as if they were
            the deltas of whole models, its result factored back by SVD.
        weights: a number or one per adapter; 1 each by default. Sums are not divided by them ("cat", "svd"); the other methods do as
            their own parameters say.
        on: ``"factors"`` applies the method to all A and to all B separately, as PEFT's `add_weighted_adapter` does: cheap, but the
            product of merged factors is not the merge of the products.
        rank: of the result, at most; by default for all but "cat" the largest of the adapters' ranks of the module.
        energy: in (0, 1]: choose for each module the smallest rank that keeps this fraction of the squared norm, up to `rank` if given.
        parameters: of the method, by their names in recipes: ``{"density": 0.5}``; a number or one per adapter where they allow it.
        dtype: of the result; by default the adapters' own for "cat" if nothing has to be rounded, and for all others; else float32.
        check_base: refuse adapters that name different base models.
        force: replace an existing `out`, once the new one is complete.
        progress: called as ``progress(bytes_done, bytes_total)``, of the adapters' factors.

    Raises:
        ValueError: arguments that make no sense together, or values that the method refuses.
        CheckpointError: an adapter cannot be used, or they do not fit each other.
        NonFiniteError: a factor has a NaN or an infinity.
        FileExistsError: `out` exists.
        OSError: writing failed.
    """
    code = dtypes.check_dtype(dtype)
    settings = {"method": method, "weights": weights, "on": on, "rank": rank, "energy": energy, "parameters": parameters}
    out = Path(out).absolute()
    with open_job(adapters, check_base=check_base, **settings) as job:
        check_place(out, force, job.adapters)
        inputs = InputFiles(job.adapters)
        sizes = {name: sum(a.modules[name].nbytes for a in job.adapters if name in a.modules) for name in job.names}
        results, done, total = {}, 0, sum(sizes.values())
        with one_thread():
            for name in job.names:
                results[name] = job.merge(name)
                done += sizes[name]
                if progress is not None:
                    progress(done, total)
        code = code or job.dtype()
        saved = {name: job.saved(name, result, code) for name, result in results.items()}
        used = [used_adapter(adapter) for adapter in job.adapters]
        inputs.check()
        files = merge_files(job.recipe(code), used, job.adapters[0].config.base_model)
        nbytes = save_adapter(out, saved, job.shared, job.config(), {"pymerge_merge": job.describe()}, files, force)
        return AdapterReport(
            out=out,
            ranks={name: module.rank for name, module in saved.items()},
            kept={name: result.kept for name, result in results.items()},
            bytes_read=sum(adapter.store.nbytes for adapter in job.adapters),
            nbytes=nbytes,
            warnings=tuple(job.warnings),
        )
