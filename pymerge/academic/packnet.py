"""PackNet: each task keeps the largest of the weights that earlier tasks left free. Status: academic."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["PackNet"]


class PackNet:
    """Masks of which task owns which weight (Mallya and Lazebnik 2018, arXiv:1711.05769).

    ::

        pack = PackNet(model)
        # train task 0, calling pack.freeze_gradients() before every optimizer step
        pack.prune(keep=0.5)            # the task keeps the larger half of the free weights, the others become 0
        # train on for a while with pack.freeze_gradients(finetune=True), then end the task
        pack.end_task()

    Args:
        model: whose parameters of at least two dimensions are shared out; biases and norms should be frozen after the first task.
        names: of the parameters, where not all of them are meant.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        chosen = set(names) if names is not None else {n for n, p in model.named_parameters() if p.dim() >= 2}
        self._parameters = {n: p for n, p in model.named_parameters() if n in chosen}
        if not self._parameters or chosen - set(self._parameters):
            raise ValueError(f"there are no parameters {sorted(chosen - set(self._parameters)) or 'to share out'}")
        self.task = 0
        self._pruned = False
        # -1 is free; int16 is enough for any number of tasks that fit into one network.
        self.owner = {n: torch.full(p.shape, -1, dtype=torch.int16, device=p.device) for n, p in self._parameters.items()}

    @torch.no_grad()
    def prune(self, keep: float) -> None:
        """Give the present task the `keep` share of the free weights that is largest in magnitude, tensor by tensor; zero the others."""
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}; it is a share of the free weights, above 0 and at most 1")
        if self._pruned:
            raise RuntimeError("this task has been pruned already; call end_task() first")
        for name, p in self._parameters.items():
            free = self.owner[name] == -1
            count = round(keep * int(free.sum()))
            magnitude = torch.where(free, p.abs().float(), -1.0).reshape(-1)
            order = torch.sort(magnitude, descending=True, stable=True).indices[:count]
            self.owner[name].view(-1)[order] = self.task
            p[self.owner[name] == -1] = 0
        self._pruned = True

    @torch.no_grad()
    def freeze_gradients(self, finetune: bool = False) -> None:
        """Zero the gradients of weights that the present task may not change: those of earlier tasks and, after pruning (`finetune`), the
        free ones. Weight decay, and momentum from an earlier task, move weights without a gradient: make a new optimizer for each task."""
        for name, p in self._parameters.items():
            if p.grad is not None:
                own = self.owner[name] == self.task
                p.grad *= own if finetune else own | (self.owner[name] == -1)

    def end_task(self) -> None:
        """Go on to the next task."""
        if not self._pruned:
            raise RuntimeError("prune() decides what this task keeps; call it first")
        self.task += 1
        self._pruned = False

    def weights_of(self, task: int) -> dict[str, Tensor]:
        """The parameters as that task sees them: its own weights and those of the tasks before it, the others 0."""
        return {n: torch.where((self.owner[n] >= 0) & (self.owner[n] <= task), p.detach(), 0) for n, p in self._parameters.items()}
