"""Divergences of softmax distributions in differentiable fp64 torch, from the definitions; finite logits only."""

import math

import torch
from torch.nn.functional import kl_div, log_softmax


def divergence(student, teacher, kind, beta=0.5, temperature=1.0):
    log_q, log_p = (log_softmax(x.double() / temperature, -1) for x in (student, teacher))
    log_m = torch.logaddexp(math.log(beta) + log_p, math.log(1 - beta) + log_q)

    def kl(log_a, log_b):
        return kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    return {"forward": kl(log_p, log_q), "reverse": kl(log_q, log_p), "jsd": beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)}[kind]
