"""Numbers that a caller gives: one or one per model, checked where the message can still name the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["finite", "integer", "per_model"]


def finite(value: Any, what: str) -> float:
    """`value` as a float.

    Raises:
        TypeError: not one number.
        ValueError: NaN or infinite.
    """
    try:
        if isinstance(value, str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} is {value!r}; pass one number") from None
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}; it must be finite")
    return number


def integer(value: Any, what: str) -> int:
    """`value` as an int, also from NumPy's and torch's integers.

    Raises:
        TypeError: not an integer.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is {value!r}; pass an integer") from None


def per_model(values: Any, count: int, what: str) -> tuple[float, ...]:
    """`values` as one float per model: None is 1 for all, a number holds for all, else there must be `count` of them.

    Raises:
        TypeError: not numbers.
        ValueError: not one per model.
    """
    if values is None:
        return (1.0,) * count
    try:
        if isinstance(values, Tensor):
            values = values.tolist()
        if isinstance(values, (str, bytes, Mapping)):
            raise TypeError
        if not hasattr(values, "__iter__"):
            return (float(values),) * count
        given = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise TypeError(f"{what} is {values!r}; pass a number or a sequence with one number per model") from None
    if len(given) != count:
        raise ValueError(f"{what} has {len(given)} numbers for {count} models")
    return given
