"""adapter_config.json: what an adapter's factors mean, and which adapters mean something else than base + scale * B @ A."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..extras import read_small
from ..format import CheckpointError, load_json

__all__ = ["AdapterConfig", "read_adapter_config"]

CONFIG = "adapter_config.json"

OTHER_TYPES = {
    "ADALORA": "its ranks and singular values are trained, and it has no fixed B @ A",
    "LOHA": "it is a Hadamard product of two low-rank products",
    "LOKR": "it is a Kronecker product",
    "IA3": "it scales activations",
    "PROMPT_TUNING": "it adds tokens to the input and changes no weights",
    "P_TUNING": "it adds tokens to the input and changes no weights",
    "PREFIX_TUNING": "it adds tokens to the attention and changes no weights",
    "OFT": "it rotates weights",
    "BOFT": "it rotates weights",
    "VERA": "its factors are shared random matrices",
}

VARIANTS = {
    "use_dora": "DoRA normalises each row of base + B @ A",
    "use_qalora": "QA-LoRA pools the inputs of groups of weights",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "velora_config": "VeLoRA compresses activations",
    "monteclora_config": "MonteCLoRA's factors are random",
    "kasa_config": "KaSA has singular values between the factors, and a truncated base",
    "arrow_config": "Arrow chooses among adapters for each token",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "layer_replication": "its layers are copies of the base's layers",
    "target_parameters": "it adapts parameters of mixtures of experts",
    "trainable_token_indices": "it holds rows of the embeddings",
}
"""Settings that, when set, make the weights something else than base + scale * B @ A, or hold more than that."""

CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Kinds of initialisation that take something out of the base's weights: the adapter belongs to what is left, not to the base."""


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that says what the factors mean.

    Attributes:
        rank, alpha: of modules that the patterns do not name.
        rank_pattern, alpha_pattern: regular expression for the end of a module's name -> value.
        rslora: scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        fan_in_fan_out: weights of the modules are stored as (in, out).
        base_model, revision: what it was trained on, None when it does not say.
        content: the whole file.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    base_model: str | None
    revision: str | None
    content: Mapping[str, Any]

    def rank_of(self, module: str) -> int:
        """The rank that a module has."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B @ A of a module is multiplied by."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the whole name, or its end after a dot."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check the adapter_config.json of a folder.

    Raises:
        CheckpointError: there is none, it is malformed, or it is not of a plain LoRA; says why.
    """
    path = folder / CONFIG
    content = load_json(read_small(path), str(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    kind = content.get("peft_type")
    if kind != "LORA":
        reason = OTHER_TYPES.get(str(kind).upper())
        raise CheckpointError(f"{path}: peft_type {kind!r} is not supported{f': {reason}' if reason else ''}; only LORA is")
    for key, reason in VARIANTS.items():
        if content.get(key) or (key in ("layer_replication", "alora_invocation_tokens") and content.get(key) is not None):
            raise CheckpointError(f"{path}: {key} is set, which is not supported: {reason}")
    start = str(content.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which takes part of the base's weights away: the adapter does not fit the base "
            "itself. Convert it to a plain LoRA with PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...)) first"
        )
    return AdapterConfig(
        rank=_rank(content.get("r"), path, "r"),
        alpha=_number(content.get("lora_alpha", 8), path, "lora_alpha"),
        rank_pattern=_pattern(content.get("rank_pattern"), path, "rank_pattern", _rank),
        alpha_pattern=_pattern(content.get("alpha_pattern"), path, "alpha_pattern", _number),
        rslora=_flag(content.get("use_rslora"), path, "use_rslora"),
        fan_in_fan_out=_flag(content.get("fan_in_fan_out"), path, "fan_in_fan_out"),
        base_model=_text(content.get("base_model_name_or_path")),
        revision=_text(content.get("revision")),
        content=content,
    )


def _rank(value: Any, path: Path, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {key} is {value!r}, not a positive integer")
    return value


def _number(value: Any, path: Path, key: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e30:
        raise CheckpointError(f"{path}: {key} is {value!r}, not a finite number")
    return value


def _flag(value: Any, path: Path, key: str) -> bool:
    if value not in (None, True, False):
        raise CheckpointError(f"{path}: {key} is {value!r}, neither true nor false")
    return bool(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _pattern(value: Any, path: Path, key: str, check) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} is not an object of patterns")
    for pattern, entry in value.items():
        check(entry, path, f"{key}[{pattern!r}]")
        # A repeated group, or many repetitions, can take the regular expression engine for ever.
        if len(pattern) > 300 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise CheckpointError(
                f"{path}: {key}: pattern {pattern[:80]!r} is too complicated; name modules or use at most three repetitions"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{path}: {key}: pattern {pattern[:80]!r} is not a regular expression: {error}") from None
    return value
