"""Merging after every stage of a run, instead of once at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..merge_methods.magmax import magmax
from ..merge_methods.task_arithmetic import task_arithmetic
from ..merge_methods.ties import ties
from ..merge_methods.wise_ft import wise_ft

__all__ = ["SequentialMerger"]

RUNNING = {"ema": "decay", "wise_ft": "alpha"}
FROM_BASE = {"task_arithmetic": task_arithmetic, "ties": ties, "magmax": magmax}


class SequentialMerger:
    """The merged model after each of a sequence of stages, and what the next stage should start from.

    ===================== ============================================================== ===============================================
    method                merged_t                                                       settings
    ===================== ============================================================== ===============================================
    ema                   decay * merged_(t-1) + (1 - decay) * stage_t                   decay
    wise_ft               (1 - alpha) * merged_(t-1) + alpha * stage_t                   alpha: of each stage, a number or one per stage
    task_arithmetic       base + scale * sum of the stages' deltas                       scale
    ties                  TIES of all stages so far                                      those of :func:`pymerge.ties`
    magmax                per element the stage that moved it furthest                   those of :func:`pymerge.magmax`
    ===================== ============================================================== ===============================================

    The running ones start from the base and keep two models; the others keep every stage. Dziadzio et al. 2024 (arXiv:2412.06712) find that
    what a stage starts from and what is deployed matter far more than the rule of merging, and that averaging does as well as anything:
    hence the defaults. MagMax: Marczak et al. 2024, arXiv:2407.06322; averaging before and after alignment: Lin et al. 2023,
    arXiv:2309.06256.

    Args:
        base: the model before the first stage: a mapping of name -> tensor; it is kept, not copied.
        method: see above.
        init: what the next stage starts from: ``"merged"``, ``"last"`` (the stage as it was trained) or ``"base"``.
        settings: of the method.

    Raises:
        ValueError: an unknown method or init, or a setting that is out of range.
    """

    def __init__(self, base: Mapping[str, Tensor], method: str = "ema", *, init: str = "merged", **settings: Any) -> None:
        if method not in (*RUNNING, *FROM_BASE):
            raise ValueError(f"method is {method!r}; choose one of {', '.join(map(repr, (*RUNNING, *FROM_BASE)))}")
        if init not in ("merged", "last", "base"):
            raise ValueError(f"init is {init!r}; choose 'merged', 'last' or 'base'")
        if method in RUNNING:
            wanted = RUNNING[method]
            if set(settings) != {wanted}:
                raise ValueError(f"method {method!r} takes {wanted}= and nothing else, got {sorted(settings)}")
            shares = settings[wanted] if isinstance(settings[wanted], Sequence) else [settings[wanted]]
            if not shares or not all(0.0 <= float(s) <= 1.0 for s in shares):
                raise ValueError(f"{wanted} is {settings[wanted]}; it is a share, between 0 and 1")
        self.base, self.method, self.init, self.settings = base, method, init, dict(settings)
        self.names: list[str] = []
        self._stages: list[Mapping[str, Tensor]] = []
        self._last: Mapping[str, Tensor] = base
        self._merged: Mapping[str, Tensor] = base

    def add(self, model: Mapping[str, Tensor], name: str = "") -> dict[str, Tensor]:
        """Take in the model that a stage made; returns the new merged model, to be deployed.

        Args:
            model: with the base's names and shapes; kept, so pass a copy of a model that is trained further.
            name: of the stage.
        """
        if self.method in RUNNING:
            merged = wise_ft(self._merged, model, alpha=self._alpha(len(self.names)))
        else:
            stages = [*self._stages, model]
            if self.method == "task_arithmetic":
                merged = task_arithmetic(self.base, stages, [float(self.settings.get("scale", 1.0))] * len(stages))
            else:
                merged = FROM_BASE[self.method](self.base, stages, **self.settings)
            self._stages = stages
        self._last, self._merged = model, merged
        self.names.append(name or f"stage {len(self.names) + 1}")
        return dict(merged)

    def _alpha(self, number: int) -> float:
        share = self.settings[RUNNING[self.method]]
        if isinstance(share, Sequence):
            if number >= len(share):
                raise ValueError(f"{RUNNING[self.method]} has {len(share)} values, and this is stage {number + 1}")
            share = share[number]
        return 1.0 - float(share) if self.method == "ema" else float(share)

    @property
    def merged(self) -> dict[str, Tensor]:
        """The present merged model; the base before the first stage."""
        return dict(self._merged)

    def next_init(self) -> dict[str, Tensor]:
        """A copy of what the next stage should start from."""
        source = {"merged": self._merged, "last": self._last, "base": self.base}[self.init]
        return {name: t.clone() for name, t in source.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the base (tensors, not copies)."""
        return {
            "method": self.method, "names": list(self.names), "stages": [dict(s) for s in self._stages], "last": dict(self._last),
            "merged": dict(self._merged),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with the same base.

        Raises:
            ValueError: it is of another method.
        """
        if state["method"] != self.method:
            raise ValueError(f"the state is of method {state['method']!r}, this merger's is {self.method!r}")
        if any(not torch.is_tensor(t) for t in state["merged"].values()) or set(state["merged"]) != set(self.base):
            raise ValueError("the state's tensors are not those of this base")
        self.names, self._stages = list(state["names"]), list(state["stages"])
        self._last, self._merged = state["last"], state["merged"]
