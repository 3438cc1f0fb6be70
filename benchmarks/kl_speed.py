"""Times a divergence and its gradient beside plain torch, 1024 rows of 32,000 bf16 logits: python benchmarks/kl_speed.py [rows vocab]"""

import sys
import time

import torch
import torch.nn.functional as F

from pymerge import kl_ops, native


def plain(student, teacher, kind):
    log_q, log_p = (F.log_softmax(x.float(), dim=-1) for x in (student, teacher))
    if kind == "forward":
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    if kind == "reverse":
        return F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return sum(F.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q)) / 2


def ours(student, teacher, kind):
    return torch.ops.pymerge.kl_divergence(student, teacher, kind).sum()


def milliseconds(function, student, teacher, kind, repeat):
    best = float("inf")
    for _ in range(repeat + 1):  # the first warms up
        student.grad = None
        start = time.perf_counter()
        loss = function(student, teacher, kind)
        loss.backward()
        best = min(best, time.perf_counter() - start)
    return best * 1e3, loss.item(), student.grad


def main(rows=1024, vocab=32_000):
    torch.manual_seed(0)
    student = (3 * torch.randn(rows, vocab)).bfloat16()
    teacher = (student.float() + torch.randn(rows, vocab)).bfloat16()
    student.requires_grad_()
    print(f"{rows} x {vocab} bf16, forward and backward, {torch.get_num_threads()} threads")
    for kind in kl_ops.KINDS:
        baseline, loss, gradient = milliseconds(plain, student, teacher, kind, 3)
        for isa in native.available_isas():
            native.use_isa(isa)
            time_taken, our_loss, our_gradient = milliseconds(ours, student, teacher, kind, 5)
            if abs(our_loss - loss) > 1e-3 * loss or not torch.allclose(our_gradient.float(), gradient.float(), rtol=0.02, atol=1e-6):
                raise SystemExit(f"{kind}, {isa}: the result is wrong, so its time means nothing")
            print(f"{kind:8} {isa:7} torch {baseline:7.1f} ms   pymerge {time_taken:6.1f} ms   {baseline / time_taken:5.1f}x")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
