"""The choices in which published implementations of one merge method differ, and their named presets.

Two programs that both say "TIES, density 0.2" give different weights: they rank within a tensor or over the whole model, keep ties or
break them, vote by mass or by count, multiply the weights in before or after the vote. A :class:`Convention` names every such choice;
a preset is a row of a table, and no code anywhere asks for a preset's name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Union

__all__ = ["Convention", "ConventionLike", "kept_count", "presets"]

ConventionLike = Union[str, "Convention"]

_CHOICES: dict[str, tuple] = {
    "scope": ("tensor", "model"),
    "tie_break": ("first", "all"),
    "vote": ("mass", "count"),
    "vote_weighted": (True, False),
    "zero_vote": ("positive", "majority", "drop"),
    "divisor": ("weights", "count", "none"),
    "rescale": ("density", "norm", "none"),
    "k": ("floor1", "floor", "paper", "complement"),
}


@dataclass(frozen=True)
class Convention:
    """How a method resolves what its paper leaves open.

    Attributes:
        scope: ``"tensor"`` ranks magnitudes within each tensor, ``"model"`` over all tensors of a state dict together (TIES paper).
        tie_break: among elements whose magnitude equals the k-th: ``"first"`` keeps the lowest flat indices so that exactly k stay;
            ``"all"`` keeps every one of them.
        vote: sign election by the sign of the sum (``"mass"``) or of the sum of signs (``"count"``).
        vote_weighted: whether the per-model weights multiply the deltas before the election (mergekit) or after it (PEFT).
        zero_vote: what an exactly tied election elects: ``"positive"``; ``"majority"``, the sign of the sum of all elections' signs in
            the scope (negative when that is zero too, as the paper's code has it); ``"drop"``, nobody: the merged delta is zero.
        divisor: divide the kept sum by the sum of the kept weights, by the count of kept models, or not at all. Without an election,
            ``"weights"`` divides by the sum of all weights. A zero divisor counts as one.
        rescale: multiply the kept part of a delta by 1/density, by the factor that restores its L1 norm, or by nothing.
        k: how many of n elements a density keeps:
            ``"floor1"``: max(1, int(density*n)), 0 at density 0; ``"floor"``: int(density*n); ``"paper"``: int(density*n)+1 (kthvalue's
            off-by-one in the authors' code); ``"complement"``: n - max(int((1-density)*n), 1) + 1. Never more than n.
    """

    scope: Literal["tensor", "model"] = "tensor"
    tie_break: Literal["first", "all"] = "first"
    vote: Literal["mass", "count"] = "mass"
    vote_weighted: bool = True
    zero_vote: Literal["positive", "majority", "drop"] = "positive"
    divisor: Literal["weights", "count", "none"] = "weights"
    rescale: Literal["density", "norm", "none"] = "none"
    k: Literal["floor1", "floor", "paper", "complement"] = "floor1"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"Convention.{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")

    def replace(self, **changes) -> Convention:
        """The same convention with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def preset(cls, name: str, method: str) -> Convention:
        """The convention that preset `name` uses for `method` (``"ties"``, ``"dare_linear"``, ...).

        Raises:
            ValueError: no such preset, or the program it is named after does not define the method as one sparsify-and-merge step.
        """
        if name not in _PRESETS:
            raise ValueError(f"convention {name!r} does not exist; choose one of {', '.join(map(repr, _PRESETS))}")
        table = _PRESETS[name]
        if method not in table:
            raise ValueError(
                f"convention {name!r} does not define {method!r} (it defines {', '.join(table)}); "
                "pass a Convention to choose each detail yourself"
            )
        return table[method]

    @classmethod
    def resolve(cls, convention: ConventionLike, method: str) -> Convention:
        """`convention` itself, or the preset it names."""
        if isinstance(convention, Convention):
            return convention
        if isinstance(convention, str):
            return cls.preset(convention, method)
        raise TypeError(f"convention is a {type(convention).__name__}; pass a preset's name or a Convention")


_MERGEKIT = Convention()  # mergekit 0.1.5, merge_methods/generalized_task_arithmetic.py
_MERGEKIT_DARE = _MERGEKIT.replace(divisor="none", rescale="norm")
_DARE = _MERGEKIT.replace(divisor="none", rescale="density")  # Yu et al. 2024, eq. 2: delta / (1 - p)
_BREADCRUMBS = {method: _MERGEKIT.replace(divisor="none", k="floor") for method in ("breadcrumbs", "breadcrumbs_ties")}
_PAPER = Convention(  # Yadav et al. 2023 and its repository, src/utils/merge_utils.py
    scope="model", tie_break="all", vote="mass", vote_weighted=False, zero_vote="majority", divisor="count", rescale="none", k="paper"
)
_PEFT = Convention(vote_weighted=False, divisor="count", k="floor")  # peft 0.21 utils/merge_utils.py
_SD_MECHA = Convention(tie_break="all", vote="count", vote_weighted=False, zero_vote="drop", divisor="count", k="complement")

_PRESETS: dict[str, dict[str, Convention]] = {
    "default": {
        "ties": _MERGEKIT,
        "dare_linear": _DARE,
        "dare_ties": _DARE,
        **_BREADCRUMBS,
        "della": _MERGEKIT.replace(rescale="density"),
        "della_linear": _DARE,
    },
    "mergekit": {
        "ties": _MERGEKIT,
        "dare_linear": _MERGEKIT_DARE,
        "dare_ties": _MERGEKIT_DARE,
        **_BREADCRUMBS,
        "della": _MERGEKIT.replace(rescale="norm"),
        "della_linear": _MERGEKIT_DARE,
    },
    "paper": {"ties": _PAPER, "dare_linear": _DARE},
    "peft": {
        "ties": _PEFT,
        "dare_linear": _PEFT.replace(divisor="none", rescale="density"),
        "dare_ties": _PEFT.replace(rescale="density"),
    },
    "mergelm": {"ties": _PAPER.replace(k="complement"), "dare_linear": _DARE},
    "fusion_bench": {"ties": _PAPER.replace(divisor="none"), "dare_linear": _DARE},
    "sd_mecha": {"ties": _SD_MECHA},
}


def presets() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(_PRESETS)


def kept_count(density: float, n: int, rule: str) -> int:
    """How many of `n` elements `density` keeps under `Convention.k` = `rule`. Products are taken in double precision, as the peers do."""
    if n == 0:
        return 0
    if rule == "floor1":
        k = 0 if density <= 0 else max(1, int(density * n))
    elif rule == "floor":
        k = int(density * n)
    elif rule == "paper":
        k = int(density * n) + 1
    elif rule == "complement":
        k = n - max(int((1 - density) * n), 1) + 1
    else:
        raise ValueError(f"unknown rule {rule!r} for k")
    return n if density >= 1 else min(k, n)
