"""Quadratic penalties on leaving the weights that mattered for earlier tasks: EWC, SI, MAS.

All of them keep, per parameter, an importance and the value after the task, and add ``strength * sum importance * (theta - theta*)^2`` to
the loss; they differ in how importance is measured. Status: academic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EWC", "MAS", "SynapticIntelligence"]


class _Quadratic:
    """Importances and anchors of the tasks so far."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        if strength < 0:
            raise ValueError(f"the penalty's strength is {strength}; it must not be negative")
        self.model, self.strength = model, strength
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("no parameter of the model requires a gradient, so there is nothing to hold")
        self.tasks: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def _anchor(self, importance: dict[str, Tensor]) -> None:
        self.tasks.append((importance, {name: p.detach().clone() for name, p in self._parameters.items()}))

    def penalty(self) -> Tensor:
        """To be added to the loss; 0 before the first task ended."""
        total = next(iter(self._parameters.values())).new_zeros(())
        for importance, anchor in self.tasks:
            for name, p in self._parameters.items():
                total = total + (importance[name] * (p - anchor[name]).square()).sum()
        return self.strength * total

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    def _mean_over_samples(self, samples: Iterable, scalar: Callable[[Any], Tensor], use: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Mean of use(gradient of scalar(sample)): sample by sample, since the square of a mean is not the mean of squares."""
        total, count = self._zeros(), 0
        was_training = self.model.training
        self.model.eval()
        try:
            for sample in samples:
                gradients = torch.autograd.grad(scalar(sample), list(self._parameters.values()), allow_unused=True)
                for name, gradient in zip(self._parameters, gradients):
                    if gradient is not None:
                        total[name] += use(gradient)
                count += 1
        finally:
            self.model.train(was_training)
        if not count:
            raise ValueError("there are no samples to measure importance on")
        return {name: t / count for name, t in total.items()}


class EWC(_Quadratic):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3): ``lam / 2 * sum F (theta - theta*)^2``, F the
    diagonal of the Fisher information.

    Args:
        model: a classifier that maps inputs ``[1, ...]`` to logits ``[1, classes]``.
        lam: strength; the half is inside.
        fisher: ``"true"``: gradients of log p of labels drawn from the model, which is the definition; ``"empirical"``: of the given
            labels.
        seed: of the draws.
    """

    def __init__(self, model: nn.Module, lam: float, *, fisher: str = "true", seed: int = 0) -> None:
        super().__init__(model, lam / 2)
        if fisher not in ("true", "empirical"):
            raise ValueError(f"fisher is {fisher!r}; choose 'true' or 'empirical'")
        self.fisher = fisher
        self._generator = torch.Generator().manual_seed(seed)

    def end_task(self, samples: Iterable[tuple[Tensor, int | Tensor]]) -> None:
        """Measure importance on (input, label) pairs of the task, inputs without a batch dimension, and anchor the present weights."""

        def log_p(sample: tuple[Tensor, int | Tensor]) -> Tensor:
            inputs, label = sample
            log_probabilities = torch.log_softmax(self.model(inputs[None])[0], -1)
            if self.fisher == "true":
                label = torch.multinomial(log_probabilities.detach().exp().cpu(), 1, generator=self._generator).item()
            return log_probabilities[int(label)]

        self._anchor(self._mean_over_samples(samples, log_p, torch.square))


class MAS(_Quadratic):
    """Memory aware synapses (Aljundi et al. 2018, arXiv:1711.09601, eq. 2-4): ``lam * sum Omega (theta - theta*)^2``, Omega the mean over
    samples of ``|d ||f(x)||^2 / d theta|``. Needs no labels."""

    def __init__(self, model: nn.Module, lam: float) -> None:
        super().__init__(model, lam)

    def end_task(self, inputs: Iterable[Tensor]) -> None:
        """Measure importance on inputs without a batch dimension and anchor the present weights."""
        self._anchor(self._mean_over_samples(inputs, lambda x: self.model(x[None]).square().sum(), torch.abs))


class SynapticIntelligence(_Quadratic):
    """Synaptic intelligence (Zenke et al. 2017, arXiv:1703.04200, eq. 3-5): ``c * sum Omega (theta - theta*)^2``, importance from the path
    of training: what each parameter's moves took off the loss, over the square of how far it went.

    ::

        loss.backward()                 # the task's loss without the penalty
        si.before_step()
        (strength * si.penalty()).backward(); optimizer.step()
        si.after_step()

    Args:
        model: in training.
        c: strength.
        xi: damping of the division.
    """

    def __init__(self, model: nn.Module, c: float = 0.1, xi: float = 1e-3) -> None:
        super().__init__(model, c)
        if not xi > 0:
            raise ValueError(f"xi is {xi}; it keeps a division by zero away, so it must be positive")
        self.xi = xi
        self._path = self._zeros()
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def before_step(self) -> None:
        """Note gradients and values: after the task loss's backward, before the penalty's and the step."""
        self._before = {name: (p.grad.clone(), p.detach().clone()) for name, p in self._parameters.items() if p.grad is not None}

    def after_step(self) -> None:
        """Add what the step's moves took off the loss."""
        for name, (gradient, value) in self._before.items():
            self._path[name] -= gradient * (self._parameters[name].detach() - value)
        self._before = {}

    def end_task(self) -> None:
        """Turn the path into importance and anchor the present weights."""
        moved = {name: p.detach() - self._start[name] for name, p in self._parameters.items()}
        self._anchor({name: (path / (moved[name].square() + self.xi)).clamp(min=0) for name, path in self._path.items()})
        self._path = self._zeros()
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
