"""Exponential moving averages of a model in training: a function for one step, a class that keeps the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import many_ops
from ..tree import Paired, Source

__all__ = ["EMA", "ema_update"]


def ema_update(ema: Any, model: Any, *, decay: float, check_finite: bool = True) -> None:
    """One step of a moving average, in place: ``ema = decay * ema + (1 - decay) * model``.

    The arithmetic is fp32 (fp64 where a tensor is fp64), but the result is rounded to the dtype of `ema`. Keep `ema` in fp32 when the model
    is bf16: near decay 0.999 a bf16 average no longer moves, because a step is less than half a unit in its last place.

    Args:
        ema: a tensor, a mapping name -> tensor or an nn.Module; its tensors are changed. Integer and boolean ones become the model's.
        model: of the same kind, names and shapes, sharing no memory with `ema`.
        decay: the old average's share, in [0, 1].
        check_finite: refuse a model with NaN or Inf.

    Raises:
        ValueError, TypeError, NonFiniteError: as :func:`pymerge.ties`, and before any tensor is changed.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; it must be between 0 and 1")
    _average(ema, model, decay, check_finite, lambda name: True)


def _average(ema: Any, model: Any, decay: float, check_finite: bool, averaged: Callable[[str], bool]) -> None:
    """One step, everything checked before anything changes. Floating tensors that are not `averaged` become the model's."""
    pairs = Paired(ema, [model], labels=("ema", "model"), nonfloat="any", needs_base="ema_update")
    if pairs.plain is not None and all(map(averaged, pairs.names)) and pairs.plain.place_in_base():
        if check_finite:
            pairs.plain.require_finite("model")
        pairs.plain.lerp(1.0 - decay, labels=("a", "b"), check_finite=False)
        return
    pairs.check_apart(pairs.sources[0], pairs.sources[1:])
    rows = [(name, *pairs.tensors(name)) for name in pairs.names if pairs.first_name[name] == name]
    moving = {name for name in pairs.merged if averaged(name)}
    pulled = [row for row in rows if row[0] in moving]
    if check_finite:
        many_ops.require_finite("model", [(name, x) for name, _, (x,) in sorted(pulled, key=lambda row: row[0])])
    many_ops.lerp_many_([average for _, average, _ in pulled], [x for _, _, (x,) in pulled], 1.0 - decay)
    for name, average, (current,) in rows:
        if name not in moving:
            average.copy_(current)


class EMA:
    """The moving average of a module's parameters, kept in fp32 (fp64 parameters in fp64), beside the module.

    Call :meth:`update` after each optimizer step. Buffers are not averaged: the newest ones are kept. Parameters that are tied are kept
    once.

    Args:
        model: the module; its present values are the first average.
        decay: the old average's share at a step, in [0, 1].
        warmup: let the share grow as ``1 - (1 + s / inv_gamma) ** -power`` up to `decay`, s counted from the first averaged step. The first
            such step is a plain copy.
        inv_gamma, power: of the warm-up.
        update_after_step: the first so many updates copy the model instead of averaging.
        update_every: average on every n-th update only; `decay` is per average, not per update.
        check_finite: refuse parameters with NaN and Inf: one bad step would spoil the average for good.

    Raises:
        TypeError: `model` is no module.
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        update_after_step: int = 0,
        update_every: int = 1,
        check_finite: bool = True,
    ) -> None:
        _require_module(model)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay is {decay}; it must be between 0 and 1")
        if not inv_gamma > 0 or not power > 0:
            raise ValueError(f"inv_gamma is {inv_gamma} and power {power}; both must be greater than 0")
        if update_after_step < 0 or update_every < 1:
            raise ValueError(f"update_after_step is {update_after_step} and update_every {update_every}; at least 0 and 1 make sense")
        self.decay, self.warmup, self.inv_gamma, self.power = decay, warmup, inv_gamma, power
        self.update_after_step, self.update_every, self.check_finite = update_after_step, update_every, check_finite
        self.step = 0
        self._inside_applied = False
        self._tensors = self._shadow_of(model)

    @staticmethod
    def _shadow_of(model: nn.Module) -> dict[str, Tensor]:
        averaged = _parameter_names(model)
        source = Source(model, "model")
        facts, tied = source.survey()
        shadow: dict[str, Tensor] = {}
        for name in source.names:
            if facts[name].trouble:
                raise TypeError(f"model: {name!r} {facts[name].trouble}")
            t = source[name]
            wide = torch.float64 if t.dtype == torch.float64 else torch.float32
            kept = t.to(wide, copy=True) if name in averaged and t.dtype.is_floating_point else t.clone()
            shadow[name] = shadow[tied[name]] if name in tied else kept
        return shadow

    def decay_at(self, step: int) -> float:
        """The old average's share at the step-th update (the first is 1)."""
        if step <= self.update_after_step:
            return 0.0
        if not self.warmup:
            return self.decay
        return min(self.decay, 1.0 - (1.0 + (step - self.update_after_step - 1) / self.inv_gamma) ** -self.power)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present values.

        Raises:
            NonFiniteError: the model has NaN or Inf; the average and the step count are as before.
            ValueError: the model's tensors are not those of the first one.
            RuntimeError: inside :meth:`applied`, where the model holds the average itself.
        """
        _require_module(model)
        if self._inside_applied:
            raise RuntimeError("update() inside applied(): the model holds the average there, not the training's weights")
        step = self.step + 1
        if step % self.update_every == 0:
            # Buffers are copied and may hold infinities, as attention masks do.
            averaged = _parameter_names(model).__contains__
            _average(self._tensors, model.state_dict(), self.decay_at(step), self.check_finite, averaged)
        self.step = step

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages, rounded to the model's dtypes, and the buffers into `model`."""
        for target, average in self._places(model):
            target.copy_(average)

    def _places(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """The model's tensors, tied ones once, and what this average has for each."""
        _require_module(model)
        pairs = Paired(self._tensors, [model.state_dict()], labels=("ema", "model"), nonfloat="any")
        rows = [pairs.tensors(name) for name in pairs.names if pairs.first_name[name] == name]
        return [(target, average) for average, (target,) in rows]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """``with ema.applied(model): evaluate(model)``: the model holds the averages inside and its own values, to the bit, afterwards."""
        places = self._places(model)
        own = [target.clone() for target, _ in places]
        self._inside_applied = True
        try:
            self.copy_to(model)
            yield model
        finally:
            self._inside_applied = False
            with torch.no_grad():
                for (target, _), value in zip(places, own):
                    target.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: the step, the settings and the tensors (not copies)."""
        return {"step": self.step, **{key: getattr(self, key) for key in _SETTINGS}, "tensors": dict(self._tensors)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken; settings are replaced too.

        Raises:
            ValueError: entries are missing, or the tensors are not this model's.
        """
        missing = [key for key in ("step", *_SETTINGS, "tensors") if key not in state]
        if missing:
            raise ValueError(f"state of an EMA lacks {', '.join(map(repr, missing))}")
        pairs = Paired(self._tensors, [state["tensors"]], labels=("ema", "state"), nonfloat="any")
        for name in pairs.names:
            own, (saved,) = pairs.tensors(name)
            own.copy_(saved)
        self.step = state["step"]
        for key in _SETTINGS:
            setattr(self, key, state[key])


_SETTINGS = ("decay", "warmup", "inv_gamma", "power", "update_after_step", "update_every")


def _parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; EMA follows an nn.Module (ema_update takes tensors and state dicts)")
