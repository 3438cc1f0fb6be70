"""Where in a base's checkpoint the tensors are that an adapter changes, and which way round they are stored."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..format import CheckpointError, TensorInfo
from .adapter import Adapter, LowRank

__all__ = ["find_shift", "orientation"]


class Shift:
    """How names of the adapted model become names of the checkpoint: a prefix goes, another comes."""

    def __init__(self, removed: str = "", added: str = "") -> None:
        self.removed = removed
        self.added = added

    def __call__(self, name: str) -> str | None:
        """The name in the checkpoint, None for one that does not have the prefix that goes."""
        return self.added + name[len(self.removed) :] if name.startswith(self.removed) else None


def find_shift(adapter: Adapter, names: Collection[str], base: str) -> Shift:
    """The shift under which the base has the weights of all the adapter's modules.

    Checkpoints of bare models leave out the name of the model inside the head ("transformer.h.0" is "h.0"), and other wrappers add one.

    Args:
        adapter: with modules.
        names: of the base's tensors.
        base: what to call the base.

    Raises:
        CheckpointError: there is no such shift, or there are several.
    """
    wanted = [f"{module}.weight" for module in adapter.modules]
    if all(name in names for name in wanted):
        return Shift()
    found = [shift for shift in _candidates(wanted, names) if all(shift(name) in names for name in wanted)]
    if len(found) == 1:
        return found[0]
    missing = [name for name in wanted if name not in names]
    if found:
        raise CheckpointError(f"{adapter.path}: {missing[0]!r} can be several tensors of {base}; rename the base's tensors")
    count = f"{len(missing)} of the {len(wanted)} weights that it changes are" if len(missing) > 1 else "a weight that it changes is"
    raise CheckpointError(f"{adapter.path}: does not fit {base}: {count} not there, the first: {missing[0]!r}")


def _candidates(wanted: list[str], names: Iterable[str]) -> list[Shift]:
    first = wanted[0]
    parts = first.split(".")
    removed = [".".join(parts[:i]) + "." for i in range(1, len(parts) - 1)]
    added = [name[: -len(first)] for name in names if name.endswith("." + first)]
    return [Shift(removed=prefix) for prefix in removed] + [Shift(added=prefix) for prefix in added]


def orientation(adapter: Adapter, weights: dict[str, TensorInfo], base: str) -> dict[str, bool]:
    """For each module, whether its weight is the transpose of B @ A.

    It is for embeddings, and for GPT-2's Conv1D layers, whose weights are (in, out). The config's fan_in_fan_out holds for the last module
    that PEFT looked at, so shapes decide; a square weight follows the others of its adapter, and only then the config.

    Args:
        adapter: with modules.
        weights: of each module in the base.
        base: what to call the base.

    Raises:
        CheckpointError: a shape that fits neither way.
    """
    result: dict[str, bool] = {}
    square: list[str] = []
    seen: dict[str, set[bool]] = {}
    for module, change in adapter.modules.items():
        shape = weights[module].shape
        if change.kind != "linear" and shape == change.shape:
            result[module] = change.kind == "embedding"
        elif change.kind == "linear" and shape in (change.shape, change.shape[::-1]):
            if change.shape[0] == change.shape[1]:
                square.append(module)
            else:
                result[module] = shape != change.shape
                seen.setdefault(_last(module), set()).add(result[module])
        else:
            raise CheckpointError(_misfit(adapter, change, weights[module], base))
    every = set().union(*(ways for name, ways in seen.items() if name not in ("lm_head", "score", "classifier")))
    for module in square:
        ways = seen.get(_last(module)) or every
        if len(ways) > 1:
            raise CheckpointError(
                f"{adapter.path}: {weights[module].name!r} of {base} is square, and it is not clear whether it is stored as (out, in) "
                "or (in, out)"
            )
        result[module] = next(iter(ways)) if ways else adapter.config.fan_in_fan_out
    return result


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _misfit(adapter: Adapter, change: LowRank, weight: TensorInfo, base: str) -> str:
    hint = ""
    if change.kind == "conv" and weight.shape[:1] == change.shape[:1] and weight.shape[2:] == change.shape[2:]:
        hint = " (a convolution with groups cannot be merged)"
    elif change.kind == "embedding" or weight.shape[1:] == change.shape[1:]:
        hint = " (was the vocabulary resized?)"
    elif weight.dtype in ("U8", "I8"):
        hint = " (its weights look quantised)"
    return f"{adapter.path}: {weight.name!r} is {list(weight.shape)} in {base}, and the adapter changes one of {list(change.shape)}{hint}"
