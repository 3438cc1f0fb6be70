"""Callbacks for the Trainer of transformers: averages of the weights in training, and a reference model that follows slowly.

Trainer(..., callbacks=[EMACallback(decay=0.999)])
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..merge_methods.ema import EMA, ema_update

__all__ = ["EMACallback", "ReferenceSyncCallback"]

STATE = "pymerge_ema.pt"


class EMACallback(TrainerCallback):
    """Keeps a moving average of the model's parameters (:class:`pymerge.EMA`), evaluates with it, saves it with every checkpoint and goes
    on from there when training is resumed.

    Args:
        decay: the old average's share at a step.
        evaluate: whether the Trainer's evaluations see the average instead of the weights in training.
        eval_datasets: how many data sets one evaluation goes over, where the Trainer has a dict of them.
        at_end: whether the model holds the average when training has ended.
        settings: further ones of :class:`pymerge.EMA`.

    Attributes:
        ema: the average, from the beginning of training on.
    """

    def __init__(
        self, decay: float = 0.999, *, evaluate: bool = True, eval_datasets: int = 1, at_end: bool = False, **settings: Any
    ) -> None:
        self.decay, self.evaluate, self.eval_datasets, self.at_end, self.settings = decay, evaluate, eval_datasets, at_end, settings
        self.ema: EMA | None = None
        self._applied: AbstractContextManager | None = None
        self._evaluations = 0

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        self.ema = EMA(model, self.decay, **self.settings)
        if state.global_step:  # resumed
            saved = _state_file(args, state)
            if not saved.is_file():
                raise ValueError(
                    f"{saved} does not exist, so the average cannot go on from there; train without resuming, or without EMACallback"
                )
            self.ema.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))

    def on_step_end(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        self.ema.update(model)
        self._apply_before_evaluation(control, model)

    def on_epoch_end(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        self._apply_before_evaluation(control, model)

    def _apply_before_evaluation(self, control, model: nn.Module) -> None:
        # The Trainer has no event before an evaluation, but its own callback, which runs before others, has decided by now.
        if self.evaluate and control.should_evaluate and self._applied is None:
            self._applied = self.ema.applied(model)
            self._applied.__enter__()
            self._evaluations = 0

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._evaluations += 1
        if self._applied is not None and self._evaluations == self.eval_datasets:
            self._applied.__exit__(None, None, None)
            self._applied = None

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            target = _state_file(args, state)
            partial = target.with_suffix(".partial")
            torch.save(self.ema.state_dict(), partial)
            os.replace(partial, target)

    def on_train_end(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        if self.at_end:
            self.ema.copy_to(model)


class ReferenceSyncCallback(TrainerCallback):
    """Moves a reference model towards the model in training every so many steps: ``reference = decay * reference + (1 - decay) * model``.

    Args:
        reference: of the same tensors; frozen.
        decay: the old reference's share at a move; 0 copies the model. (TRL's ``ref_model_mixup_alpha`` is 1 - decay.)
        every: steps between two moves.
    """

    def __init__(self, reference: nn.Module, *, decay: float, every: int) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it is the old reference's share, between 0 and 1")
        if every < 1:
            raise ValueError(f"every is {every}; the reference moves at most once a step")
        self.reference, self.decay, self.every = reference, decay, every

    @torch.no_grad()
    def on_step_end(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        if state.global_step % self.every == 0:
            ema_update(self.reference, model, decay=self.decay)


def _state_file(args, state) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
