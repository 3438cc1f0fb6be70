"""Losses that hold a model near another: divergences over the whole vocabulary, estimates from sampled tokens, a regulariser
(docs/losses.md)."""

from .divergence import kl_divergence
from .estimators import kl_estimate
from .linear import linear_kl_divergence
from .regularizer import AdaptiveKLController, KLRegularizer

__all__ = ["AdaptiveKLController", "KLRegularizer", "kl_divergence", "kl_estimate", "linear_kl_divergence"]
