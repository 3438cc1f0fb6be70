"""A penalty on the way from a frozen reference model, and a controller for its strength."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .divergence import kl_divergence

__all__ = ["AdaptiveKLController", "KLRegularizer"]


class KLRegularizer:
    """beta times the divergence from a reference model, over the whole vocabulary::

        regularizer = KLRegularizer(reference, beta=0.1)            # a frozen copy of the model before training
        loss = outputs.loss + regularizer(outputs.logits, batch, labels=batch["labels"])

    For a PEFT model the reference can be the model itself with its adapter switched off:
    ``KLRegularizer(peft_model, adapter_off=True)``.

    Args:
        reference: a module that gives logits, or an object with ``.logits``, for a batch. It is run without gradients and in evaluation
            mode, and left in the mode it was in.
        beta: strength; a number or an :class:`AdaptiveKLController`.
        direction: as :func:`kl_divergence` has it; forward keeps what the reference can do (default).
        adapter_off: `reference` is the PEFT model that is being trained; its adapter is switched off for the reference pass. Everything but
            the adapter must be frozen, or the reference would move.
        temperature, scale_by_t2, jsd_beta: of the divergence.

    Raises:
        ValueError: a model that cannot be its own reference.
    """

    def __init__(
        self,
        reference: nn.Module,
        beta: float | AdaptiveKLController = 0.1,
        *,
        direction: str = "forward",
        adapter_off: bool = False,
        temperature: float = 1.0,
        scale_by_t2: bool = False,
        jsd_beta: float = 0.5,
    ) -> None:
        if not isinstance(beta, AdaptiveKLController) and not (0 <= beta < math.inf):
            raise ValueError(f"beta is {beta}; a strength is a number, at least 0")
        self.reference, self._beta, self._adapter_off = reference, beta, adapter_off
        self._settings = {"direction": direction, "temperature": temperature, "scale_by_t2": scale_by_t2, "beta": jsd_beta}
        if adapter_off:
            _require_only_adapter_trains(reference)
        else:
            trained = sum(p.requires_grad for p in reference.parameters())
            if trained:
                raise ValueError(
                    f"{trained} of the reference's parameters require gradients: freeze it (reference.requires_grad_(False)), or pass "
                    "adapter_off=True if it is the PEFT model that is being trained"
                )

    @property
    def beta(self) -> float:
        """The present strength."""
        return self._beta.value if isinstance(self._beta, AdaptiveKLController) else self._beta

    def reference_logits(self, batch: Mapping[str, Any] | Tensor) -> Tensor:
        """The reference's logits, without a graph."""
        switched = self.reference.disable_adapter() if self._adapter_off else nullcontext()
        with torch.no_grad(), _evaluating(self.reference), switched:
            output = (
                self.reference(**{k: v for k, v in batch.items() if k != "labels"}) if isinstance(batch, Mapping) else self.reference(batch)
            )
        return output if isinstance(output, Tensor) else output.logits

    def divergence(self, logits: Tensor, batch: Mapping[str, Any] | Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """The divergence itself; where a batch has an ``attention_mask`` and no mask or labels are given, that is the mask."""
        if mask is None and "labels" not in options and isinstance(batch, Mapping) and "attention_mask" in batch:
            mask = batch["attention_mask"].bool()
        return kl_divergence(logits, self.reference_logits(batch), mask=mask, **self._settings, **options)

    def __call__(self, logits: Tensor, batch: Mapping[str, Any] | Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """The penalty.

        Args:
            logits: of the model in training, for the batch.
            batch: what both models are called with: keywords, or one tensor. ``labels`` are not passed on.
            mask, options: as :func:`kl_divergence` has them (labels, reduction, num_items).
        """
        if self.beta == 0:
            return logits.sum() * 0.0  # the graph stays, the reference is not run
        return self.beta * self.divergence(logits, batch, mask=mask, **options)

    def check_zero_at_start(self, model: nn.Module, batch: Mapping[str, Any] | Tensor, *, tolerance: float = 1e-3) -> float:
        """Before the first step the divergence must be 0. Returns it.

        Raises:
            ValueError: it is not; names the usual reasons.
        """
        with torch.no_grad(), _evaluating(model):
            found = float(self.divergence(_logits_of(model, batch), batch))
        if not found <= tolerance:
            raise ValueError(
                f"the divergence before training is {found:.4g}, not 0: the reference is another checkpoint, has another dtype or "
                "tokenizer, or an adapter that does not start as the identity"
            )
        return found


def _logits_of(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> Tensor:
    output = model(**{k: v for k, v in batch.items() if k != "labels"}) if isinstance(batch, Mapping) else model(batch)
    return output if isinstance(output, Tensor) else output.logits


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, then every submodule as it was."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _require_only_adapter_trains(model: nn.Module) -> None:
    if not hasattr(model, "disable_adapter"):
        raise ValueError(f"adapter_off=True needs a PEFT model; {type(model).__name__} has no disable_adapter()")
    prefix = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    moving = [name for name, p in model.named_parameters() if p.requires_grad and prefix not in name]
    if moving:
        raise ValueError(
            f"{len(moving)} parameters outside the adapter are trained too, the first {moving[0]!r}: with the adapter off the model would "
            "not be the one that training began with. Freeze them, or pass a frozen copy as the reference"
        )


class AdaptiveKLController:
    """Strength that keeps a divergence near a target (Ziegler et al. 2019, section 2.2)::

        error = clip(kl / target - 1, -0.2, 0.2);   value *= 1 + error * steps / horizon

    Args:
        init: the strength to begin with.
        target: the divergence to hold, in the loss's unit.
        horizon: steps (samples, tokens: the unit of :meth:`update`) over which an error of one is corrected.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        if not (init > 0 and target > 0 and horizon > 0):
            raise ValueError(f"init is {init}, target {target} and horizon {horizon}; all must be positive")
        self.value, self.target, self.horizon = float(init), float(target), float(horizon)

    def update(self, divergence: float, steps: float = 1) -> float:
        """The strength after `steps` during which the divergence was so large. Steps beyond the horizon count as the horizon: more would
        turn the strength negative.

        Raises:
            ValueError: the divergence is not finite.
        """
        if not math.isfinite(divergence):
            raise ValueError(f"the divergence is {divergence}; the strength {self.value:.4g} is left as it is")
        error = min(max(divergence / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * min(steps / self.horizon, 1.0)
        return self.value

    def state_dict(self) -> dict[str, float]:
        """The strength."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a strength."""
        self.value = float(state["value"])
