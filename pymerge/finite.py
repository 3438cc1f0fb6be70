"""NaN and infinity in an input: found in one read, reported with the place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["NonFiniteError", "raise_if_not_finite"]


class NonFiniteError(ValueError):
    """An input has a NaN or an infinity. Pass ``check_finite=False`` to merge such inputs anyway."""


def _all_finite(t: Tensor) -> bool:
    if t.dtype == torch.float16:  # whose sum overflows soon
        probe = torch.stack(torch.aminmax(t)) if t.numel() else t
    else:
        probe = t.sum()
    # A NaN or an infinity shows in the sum, which takes one fast read. So does an overflow, so look again before blaming the input.
    return bool(torch.isfinite(probe).all()) or bool(torch.isfinite(t).all())


def raise_if_not_finite(
    inputs: Iterable[tuple[str, Tensor | None]], name: str = "", *, first: int = 0, shape: Sequence[int] | None = None
) -> None:
    """Raise for the first of the (label, tensor) pairs that has a NaN or an infinity; `name` is the tensor's name in its model.

    With `shape` the tensors are the elements from `first` on of ones of that shape, flat.

    Raises:
        NonFiniteError: "model 1: 'w' has 2 non-finite value(s), the first nan at index [0, 3]; ...".
    """
    for label, t in inputs:
        if t is None:
            continue
        t = t.detach()
        wide = t.float() if t.dtype.itemsize == 1 else t  # fp8 knows no comparisons
        if _all_finite(wide):
            continue
        bad = torch.nonzero(~torch.isfinite(wide))
        where = tuple(bad[0].tolist())
        value, index, count = wide[where].item(), list(where), str(len(bad))
        if shape is not None:
            index, count = _unravel(first + where[0], shape), f"{count} or more"
        what = f"{name!r} " if name else ""
        raise NonFiniteError(
            f"{label}: {what}has {count} non-finite value(s), the first {value} at index {index}; "
            "pass check_finite=False to merge them anyway"
        )


def _unravel(flat: int, shape: Sequence[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        flat, remainder = divmod(flat, size)
        index.append(remainder)
    return index[::-1]
