"""Distillation: one student from one or several teachers, also from their top-k logits (docs/distill.md)."""

from .loss import distillation_loss
from .teachers import TeacherEnsemble
from .topk import TopK, top_k, topk_divergence

__all__ = ["TeacherEnsemble", "TopK", "distillation_loss", "top_k", "topk_divergence"]
