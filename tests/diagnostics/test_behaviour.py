"""Interpolation, drift of predictions, gradients."""

import pytest
import torch
from torch import nn

from pymerge import diagnostics as D


def quadratic(model):
    """Lowest at 1/2, where the line between 0 and 1 crosses."""
    return (float(model["w"]) - 0.5) ** 2


def hill(model):
    return 1 - (2 * float(model["w"]) - 1) ** 2


ENDS = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}


def test_barriers_by_hand():
    curve = D.interpolate_eval(*ENDS, hill)
    assert curve.barrier() == curve.barrier("mean") == curve.barrier("max") == pytest.approx(1) and curve.midpoint == pytest.approx(1)
    valley = D.interpolate_eval(*ENDS, quadratic, alphas=5)
    assert valley.barrier() == 0 and valley.best() == (0.5, 0.0) and valley.midpoint == -0.25
    slope = D.InterpolationCurve((0.0, 0.5, 1.0), (0.0, 3.0, 4.0))
    assert (slope.barrier(), slope.barrier("mean"), slope.barrier("max")) == (1.0, 2.0, 0.0)
    assert D.loss_barrier(*ENDS, hill) == pytest.approx(1)
    assert "no barrier" in valley.to_text() and "barrier 1 at alpha 0.5" in curve.to_text()
    with pytest.raises(ValueError, match="kind is 'mid'"):
        curve.barrier("mid")


def test_refinement_finds_the_top():
    peak = 0.37
    coarse = D.interpolate_eval(*ENDS, lambda m: -abs(float(m["w"]) - peak), alphas=3)
    fine = D.interpolate_eval(*ENDS, lambda m: -abs(float(m["w"]) - peak), alphas=3, refine=12)
    assert len(fine.alphas) == 15 and max(fine.losses) > max(coarse.losses)
    assert max(fine.losses) == pytest.approx(0, abs=0.02)


def test_barrier_matrix():
    models = {n: {"w": torch.tensor([x])} for n, x in (("a", 0.0), ("b", 1.0), ("c", 0.0))}
    found = D.barrier_matrix(models, hill)
    assert found.barriers()[0][1] == pytest.approx(1) and found.barriers()[0][2] == 0
    assert found.losses == (0.0, 0.0, 0.0) and found.barycentre == pytest.approx(hill({"w": 1 / 3}), abs=1e-6)


def test_kl_drift_counts_every_token_once():
    torch.manual_seed(0)
    model, base = nn.Embedding(5, 7).train(), nn.Embedding(5, 7)

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids)

    batches = [
        {"input_ids": torch.tensor([[0, 1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        {"input_ids": torch.tensor([[4, 4]]), "labels": torch.tensor([[4, -100]])},
    ]
    p, q = (m.weight.detach().double().log_softmax(-1) for m in (base, model))
    each = (p.exp() * (p - q)).sum(-1)
    tuned = Wrapped(model)
    assert D.kl_drift(tuned, Wrapped(base), batches) == pytest.approx(float(each[[0, 1, 2, 4]].mean()), rel=1e-5)
    assert tuned.training
    assert D.kl_drift(model, model, [torch.tensor([1, 2])], "reverse") == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="no token counts"):
        D.kl_drift(model, base, [])


def test_gradient_conflict_by_hand():
    a = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([2.0]), "only": torch.tensor([2.0])}
    b = {"x": torch.tensor([-3.0, 4.0]), "y": torch.tensor([1.0])}
    found = D.gradient_conflict(a, b)
    assert found.dot == -1.0 and found.conflicting == 0.5 and found.cosines["x"] == -0.6
    assert found.cosine == pytest.approx(-1 / (9 * 26) ** 0.5)


def test_composition_error():
    x = torch.eye(4)
    assert D.behaviour.composition_error([lambda t: t], lambda t: t * torch.tensor([1.0, 1, 1, -1]), [[x]]) == [0.25]
