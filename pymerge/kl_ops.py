"""torch.library operators of the KL kernels, and the choice of their backend.

``torch.ops.pymerge.kl_divergence(student, teacher, kind, beta=0.5, temperature=1.0, mask=None)`` gives one number per row and has
gradients for both logits. The forward and the backward pass are operators of their own, for who does without autograd:
``kl_divergence_forward``, ``kl_divergence_backward``, and ``kl_divergence_backward_``, which writes the gradient over the student's logits.
Importing this module registers them. None of them waits for a GPU. docs/kl.md has formulas and accuracy.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from . import ops, reference_kl

__all__ = ["KINDS", "check_choices"]

KINDS = ("forward", "reverse", "jsd")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_CHOICES = "str kind, float beta=0.5, float temperature=1.0, Tensor? mask=None"
_library = torch.library.Library("pymerge", "FRAGMENT")
_library.define(f"kl_divergence(Tensor student, Tensor teacher, {_CHOICES}) -> Tensor")
_library.define(f"kl_divergence_forward(Tensor student, Tensor teacher, {_CHOICES}) -> (Tensor, Tensor)")
_GIVEN = "Tensor stats, Tensor grad"
_library.define(f"kl_divergence_backward(Tensor student, Tensor teacher, {_GIVEN}, {_CHOICES}, bool of_teacher=False) -> Tensor")
_library.define(f"kl_divergence_backward_(Tensor(a!) student, Tensor teacher, {_GIVEN}, {_CHOICES}) -> ()")


# --------------------------------------------------------------------------------------------------------------------------------------
# Arguments


def check_choices(kind: str, beta: float, temperature: float) -> None:
    """Raise ValueError for choices that no divergence has."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no divergence; choose one of {', '.join(map(repr, KINDS))}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, not between 0 and 1: there jsd is 0 for all logits; use 'forward' or 'reverse'")
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature is {temperature}, not a positive number")


def _check(student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float, mask: Tensor | None) -> None:
    check_choices(kind, beta, temperature)
    if student.dim() == 0 or student.shape != teacher.shape:
        raise ValueError(
            f"student logits are {tuple(student.shape)}, teacher logits {tuple(teacher.shape)}: they must be [..., vocab] and of equal "
            "shape. Cut a padded vocabulary to the common size"
        )
    if student.shape[-1] == 0:
        raise ValueError("the vocabulary is empty")
    for t in (student, teacher):
        if t.dtype not in _DTYPES:
            raise TypeError(f"logits of dtype {t.dtype}; supported: {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}")
    if mask is not None:
        if mask.shape != student.shape[:-1]:
            raise ValueError(f"the mask is {tuple(mask.shape)}, the rows are {tuple(student.shape[:-1])}")
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise TypeError(f"the mask is {mask.dtype}; give booleans, or floating-point weights")
    for name, t in (("teacher logits", teacher), ("the mask", mask)):
        if t is not None and t.device != student.device:
            raise ValueError(f"student logits are on {student.device}, {name} on {t.device}")


def _rows(logits: Tensor) -> Tensor:
    return logits.detach().reshape(-1, logits.shape[-1]).contiguous()


def _weight(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.detach().to(torch.float32).reshape(-1).contiguous()


def _result_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


# --------------------------------------------------------------------------------------------------------------------------------------
# Backends


def _backend_for(student: Tensor, teacher: Tensor) -> ModuleType:
    name = ops.backend_name(student.device)
    if name != "reference" and _result_dtype(student, teacher) == torch.float64:
        if ops.forced_backend() is not None:
            raise ValueError(f"backend {name!r} takes fp32, bf16 and fp16 logits; these are fp64")
        name = "reference"
    if name == "reference":
        return reference_kl
    if name == "triton":
        from .triton_kernels import kl

        return kl
    from . import native_kl

    return native_kl


# --------------------------------------------------------------------------------------------------------------------------------------
# Operators


def _kl_divergence(student, teacher, kind, beta=0.5, temperature=1.0, mask=None):
    return torch.ops.pymerge.kl_divergence_forward(student, teacher, kind, beta, temperature, mask)[0]


def _forward(student, teacher, kind, beta=0.5, temperature=1.0, mask=None):
    _check(student, teacher, kind, beta, temperature, mask)
    backend = _backend_for(student, teacher)
    loss, stats = backend.forward(_rows(student), _rows(teacher), kind, beta, temperature, _weight(mask))
    return loss.view(student.shape[:-1]), stats


def _backward(student, teacher, stats, grad, kind, beta=0.5, temperature=1.0, mask=None, of_teacher=False):
    _check(student, teacher, kind, beta, temperature, mask)
    backend = _backend_for(student, teacher)
    choices = (kind, beta, temperature, _weight(mask), of_teacher)
    return backend.backward(_rows(student), _rows(teacher), stats, _grad_rows(grad, stats), *choices).view(student.shape)


def _backward_inplace(student, teacher, stats, grad, kind, beta=0.5, temperature=1.0, mask=None):
    _check(student, teacher, kind, beta, temperature, mask)
    backend = _backend_for(student, teacher)
    choices = (kind, beta, temperature, _weight(mask), False)
    args = (_rows(student), _rows(teacher), stats, _grad_rows(grad, stats), *choices)
    if backend is not reference_kl and student.is_contiguous():
        backend.backward(*args, out=args[0])  # a view of the student's memory
    else:
        student.detach().copy_(backend.backward(*args).view(student.shape))


def _grad_rows(grad: Tensor, stats: Tensor) -> Tensor:
    return grad.detach().to(stats.dtype).reshape(-1).contiguous()


_library.impl("kl_divergence", _kl_divergence, "CompositeImplicitAutograd")
_library.impl("kl_divergence_forward", _forward, "CompositeExplicitAutograd")
_library.impl("kl_divergence_backward", _backward, "CompositeExplicitAutograd")
_library.impl("kl_divergence_backward_", _backward_inplace, "CompositeExplicitAutograd")


@torch.library.register_fake("pymerge::kl_divergence_forward")
def _(student, teacher, kind, beta=0.5, temperature=1.0, mask=None):
    _check(student, teacher, kind, beta, temperature, mask)
    loss = student.new_empty(student.shape[:-1], dtype=_result_dtype(student, teacher))
    return loss, loss.new_empty((loss.numel(), 6))


@torch.library.register_fake("pymerge::kl_divergence_backward")
def _(student, teacher, stats, grad, kind, beta=0.5, temperature=1.0, mask=None, of_teacher=False):
    return torch.empty_like(teacher if of_teacher else student, memory_format=torch.contiguous_format)


@torch.library.register_fake("pymerge::kl_divergence_backward_")
def _(student, teacher, stats, grad, kind, beta=0.5, temperature=1.0, mask=None):
    return None


def _save(ctx, inputs, output) -> None:
    student, teacher, ctx.kind, ctx.beta, ctx.temperature, mask = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(student, teacher, output[1], mask)


def _differentiate(ctx, grad, _):
    student, teacher, stats, mask = ctx.saved_tensors
    choices = (ctx.kind, ctx.beta, ctx.temperature, mask)
    grads = [
        torch.ops.pymerge.kl_divergence_backward(student, teacher, stats, grad, *choices, of_teacher) if needed else None
        for needed, of_teacher in zip(ctx.needs_input_grad, (False, True))
    ]
    return (*grads, None, None, None, None)


torch.library.register_autograd("pymerge::kl_divergence_forward", _differentiate, setup_context=_save)
