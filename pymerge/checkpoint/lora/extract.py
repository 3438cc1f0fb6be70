"""`pymerge.extract_lora`: the LoRA adapter nearest to what a tuned model changed in its base."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..._version import __version__
from .. import dtypes
from ..extras import read_config
from ..format import CheckpointError
from ..load import load_tensor
from ..reader import open_checkpoint
from ..store import TensorStore
from ..writer import check_target
from .factoring import factor_matrix, one_thread
from .save import SavedModule, save_adapter

__all__ = ["ExtractReport", "extract_lora"]

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

    Raises:
        CheckpointError: a checkpoint cannot be read, or the two do not have the same tensors.
        ValueError: rank or energy is out of range, or nothing that can be adapted differs.
        FileExistsError: `out` exists.
    """
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1) or (rank is None and energy is None):
        raise ValueError(f"rank is {rank!r} and energy {energy!r}; give a positive rank, or an energy in (0, 1]")
    code = None if dtype is None else dtypes.parse_dtype(str(dtype))
    if dtype is not None and code is None:
        raise ValueError(f"dtype {dtype!r} is not a dtype; choose {', '.join(dtypes.CHOICES)}")
    out = Path(out).absolute()
    problem = check_target(out, force)
    if problem:
        raise FileExistsError(f"{out}: {problem}")
    opened = [open_checkpoint(path) if isinstance(path, (str, os.PathLike)) else path for path in (model, base)]
    try:
        return _extract(*opened, out, rank, energy, modules, tuple(whole), fan_in_fan_out, base_name, code, force)
    finally:
        for store, given in zip(opened, (model, base)):
            if store is not given:
                store.close()


def _extract(
    model: TensorStore, base: TensorStore, out: Path, rank: int | None, energy: float | None, modules: str | None, whole: tuple[str, ...],
    fan_in_fan_out: bool | None, base_name: str | None, code: str | None, force: bool,
) -> ExtractReport:  # fmt: skip
    _check_same(model, base)
    if fan_in_fan_out is None:
        fan_in_fan_out = (read_config(base.folder) or {}).get("model_type") in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
    saved: dict[str, SavedModule] = {}
    kept: dict[str, float] = {}
    others: dict[str, Tensor] = {}
    left_out: list[str] = []
    with one_thread():
        for name, info in base.tensors.items():
            if not dtypes.is_merged(info.dtype):
                continue
            after, before = load_tensor(model, model.tensors[name]), load_tensor(base, info)
            if torch.equal(after, before):
                continue
            module, _, part = name.rpartition(".")
            if module.rpartition(".")[2] in whole:
                others[name] = after
            elif part == "weight" and before.dim() >= 2 and _wanted(module, modules):
                change = after.double() - before.double()
                if not bool(torch.isfinite(change).all()):
                    raise CheckpointError(f"{name!r}: has NaN or Inf in {model.path} or {base.path}")
                half = info.dtype in ("BF16", "F16")
                chosen = dtypes.torch_dtype(code or (info.dtype if half else "F64" if info.dtype == "F64" else "F32"))
                saved[module], kept[module] = _factored(module, change, rank, energy, fan_in_fan_out, chosen)
            else:
                left_out.append(name)
    if not saved:
        raise ValueError(f"no matrix that can be adapted differs between {model.path} and {base.path}")
    config = {
        "base_model_name_or_path": base_name or str(base.path), "bias": "none", "fan_in_fan_out": fan_in_fan_out, "inference_mode": True,
        "init_lora_weights": True, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "task_type": None,
        "modules_to_save": sorted(whole) if others else None,
    }  # fmt: skip
    save_adapter(
        out, saved, others, config, {"pymerge_extracted": json.dumps({"rank": rank, "energy": energy})}, _card(out, model, base), force
    )
    tensors = [t for module in saved.values() for t in (module.a, module.b)] + list(others.values())
    warnings = []
    if left_out:
        warnings.append(
            f"{len(left_out)} tensors that differ are not in the adapter, the first: {left_out[0]!r} "
            "(embeddings, heads, vectors; see `modules` and `whole`)"
        )
    return ExtractReport(out, {n: m.rank for n, m in saved.items()}, kept, tuple(left_out), sum(t.nbytes for t in tensors), tuple(warnings))


def _check_same(model: TensorStore, base: TensorStore) -> None:
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


def _factored(
    module: str, change: Tensor, rank: int | None, energy: float | None, fan_in_fan_out: bool, dtype: torch.dtype
) -> tuple[SavedModule, float]:
    kind = "conv" if change.dim() > 2 else "embedding" if module.rpartition(".")[2] in EMBEDDINGS else "linear"
    kernel = change.shape[2:]
    matrix = change.flatten(1)
    if kind == "embedding" or (kind == "linear" and fan_in_fan_out):
        matrix = matrix.t()
    b, a, kept = factor_matrix(matrix, rank, energy)
    count = a.shape[0]
    a = a.to(dtype).reshape(count, -1, *kernel)
    b = b.to(dtype).reshape(b.shape[0], count, *(1 for _ in kernel))
    return SavedModule(kind, a, b, float(count)), kept


def _card(out: Path, model: TensorStore, base: TensorStore) -> str:
    front = ["---", "library_name: peft", "tags:", "- lora", "- pymerge", "---", ""]
    text = f"A LoRA adapter extracted by pymerge {__version__} from the difference between `{model.path.name}` and `{base.path.name}`."
    return "\n".join([*front, f"# {out.name}", "", text, ""])
