"""Estimates of a divergence from the tokens that were sampled, as reinforcement learning uses them.

l = log pi(a) - log pi_ref(a) for a token a that the policy sampled. As *values*, k1 = l and k3 = exp(-l) - 1 + l are unbiased for
KL(pi || pi_ref), k2 = l^2 / 2 is not (Schulman 2020). As *losses*, differentiated as they stand, it is the other way round: the expected
gradient of k1 is 0, that of k3 is the gradient of KL(pi_ref || pi), and only that of k2 is the gradient of KL(pi || pi_ref)
(arXiv:2506.09477). So a loss here has the value of the estimator asked for and always the right gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl_estimate"]


def kl_estimate(
    logp: Tensor,
    ref_logp: Tensor,
    *,
    estimator: str = "k3",
    use: str = "loss",
    old_logp: Tensor | None = None,
    clamp: float | None = None,
) -> Tensor:
    """KL(policy || reference) per token, from the log-probabilities of the sampled tokens.

    Args:
        logp: of the policy, any shape, fp32 (of bf16 the rounding is as large as the divergence: an error).
        ref_logp: of the reference, same shape; gets no gradient.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``: the value.
        use: ``"loss"``: the value, and in expectation over tokens sampled from the policy the gradient of KL(policy || reference):
            l grad(logp). ``"reward"``: the value without a graph, to be subtracted from a reward (k1 is usual there).
        old_logp: of the policy that sampled the tokens, where that is not the present one: values and gradients are weighted by
            exp(logp - old_logp).
        clamp: bound on \\|l\\| before k3's exponential, which a single unlikely token can blow up. The clamped value is biased.

    Returns:
        fp32 (fp64), the shape of `logp`. Mask and average it yourself: every sampled token counts, padding does not.

    Raises:
        ValueError, TypeError: shapes, dtypes or names do not fit.
    """
    if logp.shape != ref_logp.shape or (old_logp is not None and old_logp.shape != logp.shape):
        raise ValueError(f"log-probabilities are {tuple(logp.shape)}, {tuple(ref_logp.shape)}: they must be of the same tokens")
    for what, t in (("logp", logp), ("ref_logp", ref_logp)):
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{what} is {t.dtype}; compute log-probabilities in fp32: at 10, bf16 steps are 0.06, more than most divergences"
            )
    if use not in ("loss", "reward"):
        raise ValueError(f"use is {use!r}; choose 'loss' or 'reward'")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp is {clamp}; it bounds a size, so it must be positive")
    with torch.no_grad():
        ratio = logp - ref_logp
        bounded = ratio if clamp is None else ratio.clamp(-clamp, clamp)
        weight = 1.0 if old_logp is None else torch.exp(logp - old_logp)
        if estimator == "k1":
            value = weight * bounded
        elif estimator == "k2":
            value = weight * bounded.square() / 2
        elif estimator == "k3":
            value = weight * (torch.expm1(-bounded) + bounded)
        else:
            raise ValueError(f"estimator is {estimator!r}; choose 'k1', 'k2' or 'k3'")
        slope = weight * ratio
    if use == "reward":
        return value
    return value + slope * (logp - logp.detach())
