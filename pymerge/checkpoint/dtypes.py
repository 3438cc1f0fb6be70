"""Element types by their safetensors codes. No torch here: `pymerge inspect` and the plan work without loading it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BITS", "CHOICES", "MERGED", "NAMES", "check_dtype", "code_of", "is_merged", "name_of", "parse_dtype", "promote", "torch_dtype"]

BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

NAMES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

MERGED = frozenset(NAMES)
"""Codes whose tensors are numbers to merge. All others (integers, booleans, scales, packed types) are copied when equal everywhere."""

_CHOSEN = {name: code for code, name in NAMES.items()}

CHOICES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
"""The names of dtypes to choose from, as messages list them."""


def is_merged(code: str) -> bool:
    """Whether tensors of this code are merged rather than copied."""
    return code in MERGED


def name_of(code: str) -> str:
    """torch's name of a code where it has one ("BF16" -> "bfloat16"), else the code."""
    return NAMES.get(code, code)


def parse_dtype(text: str) -> str | None:
    """Code of a dtype as people write it ("bfloat16" or "torch.bfloat16"), None when it is not one that a merge can have."""
    return _CHOSEN.get(text.removeprefix("torch."))


def check_dtype(dtype: str | torch.dtype | None) -> str | None:
    """Code of a dtype that was asked for; None for none.

    Raises:
        ValueError: it is not one that a merge can have.
    """
    code = None if dtype is None else parse_dtype(str(dtype))
    if dtype is not None and code is None:
        raise ValueError(f"dtype {dtype!r} is not a dtype; choose {', '.join(CHOICES)}")
    return code


def torch_dtype(code: str) -> torch.dtype:
    """torch's dtype of a merged code."""
    import torch

    return getattr(torch, NAMES[code])


def code_of(dtype: torch.dtype) -> str:
    """The code of a torch dtype that can be merged."""
    return {name: code for code, name in NAMES.items()}[str(dtype).removeprefix("torch.")]


def promote(codes: Iterable[str]) -> str:
    """The narrowest merged code that holds every value of the given ones; fp16 with bf16 is fp32, as in torch."""
    found = set(codes)
    if len(found) == 1:
        return found.pop()
    # Every fp8 value is exact in both half types, so fp8 never decides where a wider type is present.
    wide = {code for code in found if BITS[code] > 8} or {"BF16"}
    if len(wide) == 1:
        return wide.pop()
    return "F64" if "F64" in wide else "F32"
