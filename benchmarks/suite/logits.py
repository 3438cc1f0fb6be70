"""Rows of the divergences: value and gradient of KL and Jensen-Shannon between two models' logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pymerge import kl_ops  # noqa: F401 - registers the operators
from pymerge.speed.ceiling import elapsed_ms
from pymerge.speed.memory import extra_bytes

from .measure import Effort, timed
from .verify import Wrong

__all__ = ["LogitsCase", "make_logits", "measure_logits"]

LIGER = "needs a GPU: its kernels are Triton's"


@dataclass(frozen=True)
class LogitsCase:
    """`kind` of pymerge.kl_ops between bf16 logits of [rows, vocabulary], forward and backward."""

    kind: str
    rows: int
    vocabulary: int
    threads: int
    rivals: bool = True


def make_logits(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Student and teacher: logits with a spread of 3, and the teacher's a standard deviation of 1 from them."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, vocabulary, generator=generator).mul_(3)
    teacher = (student + torch.randn(rows, vocabulary, generator=generator)).bfloat16()
    return student.bfloat16().requires_grad_(), teacher


def plain(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """As it is written in torch: two fp32 log-softmaxes."""
    log_q, log_p = (F.log_softmax(x.float(), dim=-1) for x in (student, teacher))
    if kind == "forward":
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    if kind == "reverse":
        return F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return sum(F.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q)) / 2


def measure_logits(
    case: LogitsCase, student: Tensor, teacher: Tensor, effort: Effort, say: Callable[[str], None] = lambda line: None
) -> dict:
    """As measure.measure: a wrong value or gradient raises Wrong."""
    torch.set_num_threads(case.threads)

    def run(function: Callable[[Tensor, Tensor, str], Tensor]) -> Callable[[], Tensor]:
        def value_and_gradient() -> Tensor:
            student.grad = None
            loss = function(student, teacher, case.kind)
            loss.backward()
            return loss

        return value_and_gradient

    ours = run(lambda s, t, kind: torch.ops.pymerge.kl_divergence(s, t, kind).sum())
    extra = extra_bytes(ours)
    verified = _verify(case.kind, student, teacher)
    loss, gradient = ours().item(), student.grad.clone()
    rivals: list[dict] = []
    if case.rivals:
        programs = {"naive": ("naive torch", run(plain)), "torch": ("compiled", run(torch.compile(plain, dynamic=False)))}
        for kind, (label, program) in programs.items():
            rivals.append({"kind": kind, "rival": label} | _tried(program, student, loss, gradient))
            say(f"    {kind}: {label}: {rivals[-1].get('skipped') or '{:.1f} ms'.format(rivals[-1]['run'][1])}")
        rivals.append({"kind": "liger", "rival": "Liger", "skipped": LIGER})
    row = {
        "method": f"kl {case.kind}", "layout": f"{case.rows} x {case.vocabulary}", "elements": student.numel(), "tensors": 1,
        "dtype": "bf16", "models": 2, "density": None, "threads": case.threads, "extra_bytes": extra, "verified": verified,
    }  # fmt: skip
    moved = student.nbytes + teacher.nbytes + gradient.nbytes
    del gradient
    return row | timed(ours, moved, 2, True, rivals, effort)


def _verify(kind: str, student: Tensor, teacher: Tensor) -> str:
    """Value and gradient of a few rows against fp64."""
    sample = torch.linspace(0, student.shape[0] - 1, min(8, student.shape[0])).long()
    few, teachers = student.detach()[sample].requires_grad_(), teacher[sample]
    got = torch.ops.pymerge.kl_divergence(few, teachers, kind)
    got.sum().backward()
    wide = few.detach().double().requires_grad_()
    log_q, log_p = wide.log_softmax(-1), teachers.double().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    terms = {
        "forward": log_p.exp() * (log_p - log_q),
        "reverse": log_q.exp() * (log_q - log_p),
        "jsd": (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2,
    }
    want = terms[kind].sum(-1)
    want.sum().backward()
    if not torch.allclose(got.double(), want, rtol=1e-4, atol=1e-6):
        raise Wrong(f"kl {kind}: values {got.tolist()}, not {want.tolist()}")
    if not torch.allclose(few.grad.double(), wide.grad, rtol=0.01, atol=1e-6):
        raise Wrong(f"kl {kind}: a gradient is off by {(few.grad.double() - wide.grad).abs().max().item():.2g}")
    return f"values (1e-4) and gradients (1 %) of {len(sample)} rows are those of fp64"


def _tried(program: Callable[[], Tensor], student: Tensor, loss: float, gradient: Tensor) -> dict:
    result: list[float] = []

    def once() -> None:
        result.append(program().item())

    try:
        once()  # compiles
        began: list[float] = []
        extra = extra_bytes(lambda: began.append(elapsed_ms(once)))
    except Exception as error:  # no memory, no compiler
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
    close = torch.isclose(student.grad.float(), gradient.float(), rtol=0.02, atol=1e-6).float().mean().item()
    if abs(result[-1] - loss) > 1e-3 * abs(loss) or close < 0.999:
        return {"skipped": f"its result is another: {result[-1]}, not {loss}; {100 * close:.1f} % of the gradients agree"}
    return {"extra_bytes": extra, "agrees": close, "run": (program, began[0])}
