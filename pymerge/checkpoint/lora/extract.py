"""`pymerge.extract_lora`: the LoRA adapter nearest to what a tuned model changed in its base."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import dtypes
from ..extras import read_config
from ..format import CheckpointError
from ..inputs import InputFiles
from ..load import load_tensor
from ..reader import open_checkpoint
from ..store import TensorStore
from .factoring import factor_matrix, one_thread
from .record import extract_files, used_model
from .save import Files, SavedModule, check_place, save_adapter

__all__ = ["Change", "ExtractReport", "Settings", "adapter_settings", "check_same", "extract", "extract_lora"]

EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "embed_positions", "shared")
"""Last names of modules that are embeddings and no linear layers: PEFT stores their factors in another way."""


@dataclass(frozen=True)
class ExtractReport:
    """What :func:`extract_lora` wrote.

    Attributes:
        out: the folder.
        ranks: by module.
        kept: by module, the fraction of the squared Frobenius norm of the change that the factors have.
        left_out: tensors that differ and are not in the adapter.
        nbytes: of the tensors.
        warnings: what the adapter cannot do.
    """

    out: Path
    ranks: dict[str, int]
    kept: dict[str, float]
    left_out: tuple[str, ...]
    nbytes: int
    warnings: tuple[str, ...]


def extract_lora(
    model: str | os.PathLike | TensorStore,
    base: str | os.PathLike | TensorStore,
    out: str | os.PathLike,
    *,
    rank: int | None = 16,
    energy: float | None = None,
    modules: str | None = None,
    whole: Iterable[str] = (),
    fan_in_fan_out: bool | None = None,
    base_name: str | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Factor the difference between a tuned model and its base into a LoRA adapter, matrix by matrix.

    For each matrix the result is the nearest change of its rank (truncated SVD; Eckart and Young 1936). One tensor of each model is in
    memory at a time.

    Args:
        model, base: checkpoints of the same tensors.
        out: folder to make.
        rank: at most; None for no limit other than `energy`.
        energy: in (0, 1]: choose for each module the smallest rank that keeps this fraction of the squared norm of its change.
        modules: regular expression; modules whose name it finds are adapted (``"q_proj|v_proj"``). By default all that changed, except
            embeddings and the head.
        whole: last names of modules to store as they are in `model` (``modules_to_save``): ``["lm_head"]``.
        fan_in_fan_out: weights are stored as (in, out), as GPT-2's are; by default what the base's config.json says its type is.
        base_name: what to write as the base model's name; by default the base's path.
        dtype: of the factors; by default that of each base tensor's storage if it is a half type, else float32.
        force: replace an existing `out`.
        progress: called as ``progress(bytes_done, bytes_total)``, of both models.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the two do not have the same tensors.
        ValueError: rank or energy is out of range, or nothing that can be adapted differs.
        FileExistsError: `out` exists.
    """
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1) or (rank is None and energy is None):
        raise ValueError(f"rank is {rank!r} and energy {energy!r}; give a positive rank, or an energy in (0, 1]")
    code = dtypes.check_dtype(dtype)
    out = Path(out).absolute()
    opened = [open_checkpoint(path) if isinstance(path, (str, os.PathLike)) else path for path in (model, base)]
    tuned, original = opened
    try:
        check_place(out, force, opened)
        inputs = InputFiles(opened)
        check_same(tuned, original)
        if fan_in_fan_out is None:
            transposing = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
            fan_in_fan_out = (read_config(original.folder) or {}).get("model_type") in transposing
        settings = Settings(rank, None if energy is None else float(energy), modules, tuple(sorted(whole)), fan_in_fan_out, code)
        change = extract(tuned, original, settings, progress=progress)
        if not change.modules:
            raise ValueError(f"no matrix that can be adapted differs between {tuned.path} and {original.path}")
        name = base_name or str(original.path)
        inputs.check()
        files = _files_beside(tuned, original, settings, name)
        metadata = {"pymerge_extracted": json.dumps({"rank": settings.rank, "energy": settings.energy})}
        nbytes = save_adapter(out, change.modules, change.others, adapter_settings(settings, change, name), metadata, files, force)
    finally:
        for store, given in zip(opened, (model, base)):
            if store is not given:
                store.close()
    warnings = []
    if change.left_out:
        warnings.append(
            f"{len(change.left_out)} tensors that differ are not in the adapter, the first: {change.left_out[0]!r} "
            "(embeddings, heads, vectors; see `modules` and `whole`)"
        )
    ranks = {name: module.rank for name, module in change.modules.items()}
    return ExtractReport(out, ranks, change.kept, tuple(change.left_out), nbytes, tuple(warnings))


@dataclass(frozen=True)
class Settings:
    """How to extract, see :func:`extract_lora`; `code` is that of the dtype, None for that of each tensor."""

    rank: int | None
    energy: float | None
    modules: str | None
    whole: tuple[str, ...]
    fan_in_fan_out: bool
    code: str | None


@dataclass(frozen=True)
class Change:
    """What a model changed: factors by module, the part of the squared norm that they keep, whole tensors, names of what is in neither."""

    modules: dict[str, SavedModule]
    kept: dict[str, float]
    others: dict[str, Tensor]
    left_out: list[str]


def extract(
    model: TensorStore,
    base: TensorStore,
    settings: Settings,
    only: Container[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Change:
    """Factor what `model` changed in `base`.

    Args:
        model, base: of the same tensors.
        settings: how.
        only: names of tensors; None for all.
        progress: see :func:`extract_lora`.

    Raises:
        CheckpointError: a tensor cannot be read, or has a NaN or an infinity.
    """
    change, done = Change({}, {}, {}, []), 0
    with one_thread():
        for name, info in base.tensors.items():
            done += info.nbytes + model.tensors[name].nbytes
            if progress is not None:
                progress(done, base.nbytes + model.nbytes)
            if not dtypes.is_merged(info.dtype) or (only is not None and name not in only):
                continue
            after, before = load_tensor(model, model.tensors[name]), load_tensor(base, info)
            if torch.equal(after, before):
                continue
            module, _, part = name.rpartition(".")
            if module.rpartition(".")[2] in settings.whole:
                change.others[name] = after
            elif part == "weight" and before.dim() >= 2 and _wanted(module, settings.modules):
                difference = after.double() - before.double()
                if not bool(torch.isfinite(difference).all()):
                    raise CheckpointError(f"{name!r}: has NaN or Inf in {model.path} or {base.path}")
                half = info.dtype in ("BF16", "F16")
                chosen = dtypes.torch_dtype(settings.code or (info.dtype if half else "F64" if info.dtype == "F64" else "F32"))
                change.modules[module], change.kept[module] = _factored(module, difference, settings, chosen)
            else:
                change.left_out.append(name)
    return change


def adapter_settings(settings: Settings, change: Change, base_name: str) -> dict[str, Any]:
    """Those of adapter_config.json that the factors do not determine."""
    return {
        "base_model_name_or_path": base_name, "bias": "none", "fan_in_fan_out": settings.fan_in_fan_out, "inference_mode": True,
        "init_lora_weights": True, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "task_type": None,
        "modules_to_save": list(settings.whole) if change.others else None,
    }  # fmt: skip


def _files_beside(model: TensorStore, base: TensorStore, settings: Settings, base_name: str) -> Files:
    content = {"model": str(model.path), "base": str(base.path), "base_name": base_name, **dataclasses.asdict(settings)}
    options = [
        *(["--rank", str(settings.rank)] if settings.rank is not None else []),
        *(["--energy", repr(settings.energy)] if settings.energy is not None else []),
        *(["--modules", settings.modules] if settings.modules is not None else []),
        *(part for name in settings.whole for part in ("--whole", name)),
        "--fan-in-fan-out" if settings.fan_in_fan_out else "--no-fan-in-fan-out",
        *(["--base-name", base_name] if base_name != str(base.path) else []),
        *(["--dtype", dtypes.name_of(settings.code)] if settings.code is not None else []),
    ]
    command = f"pymerge lora extract {shlex.join([str(model.path), str(base.path)])} OUT {shlex.join(options)}"
    used = [used_model(model, "model"), used_model(base, "base")]
    return extract_files(content, used, base_name, command)


def check_same(model: TensorStore, base: TensorStore) -> None:
    """
    Raises:
        CheckpointError: the two do not have the same tensors.
    """
    for name in base.tensors:
        if name not in model.tensors:
            raise CheckpointError(f"{model.path}: does not have {name!r}, which {base.path} has")
        ours, theirs = model.tensors[name].shape, base.tensors[name].shape
        if ours != theirs:
            raise CheckpointError(f"{model.path}: {name!r} is {list(ours)}, in {base.path} {list(theirs)}")
    extra = next((name for name in model.tensors if name not in base.tensors), None)
    if extra is not None:
        raise CheckpointError(f"{model.path}: has {extra!r}, which {base.path} does not have")


def _wanted(module: str, pattern: str | None) -> bool:
    last = module.rpartition(".")[2]
    return bool(re.search(pattern, module)) if pattern is not None else last not in (*EMBEDDINGS, "lm_head", "embed_out")


def _factored(module: str, change: Tensor, settings: Settings, dtype: torch.dtype) -> tuple[SavedModule, float]:
    kind = "conv" if change.dim() > 2 else "embedding" if module.rpartition(".")[2] in EMBEDDINGS else "linear"
    kernel = change.shape[2:]
    matrix = change.flatten(1)
    if kind == "embedding" or (kind == "linear" and settings.fan_in_fan_out):
        matrix = matrix.t()
    b, a, kept = factor_matrix(matrix, settings.rank, settings.energy)
    count = a.shape[0]
    a = a.to(dtype).reshape(count, -1, *kernel)
    b = b.to(dtype).reshape(b.shape[0], count, *(1 for _ in kernel))
    return SavedModule(kind, a, b, float(count)), kept
