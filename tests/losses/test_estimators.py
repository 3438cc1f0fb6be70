"""Expectations over a categorical policy, worked out exactly: a sum over all its tokens."""

import pytest
import torch

from pymerge.losses import kl_estimate


def setting():
    generator = torch.Generator().manual_seed(3)
    theta, ref = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    return theta.requires_grad_(), torch.log_softmax(ref, -1)


def kl(log_q, log_p):
    return (log_q.exp() * (log_q - log_p)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_expected_gradient_of_a_loss_is_that_of_the_divergence(estimator, off_policy):
    theta, ref = setting()
    logp = torch.log_softmax(theta, -1)
    sampled_by = torch.log_softmax(torch.linspace(-1, 1, 6, dtype=torch.float64), -1) if off_policy else logp.detach()
    loss = kl_estimate(logp, ref, estimator=estimator, old_logp=sampled_by if off_policy else None)
    (gradient,) = torch.autograd.grad((sampled_by.exp() * loss).sum(), theta)
    theta2, _ = setting()
    (exact,) = torch.autograd.grad(kl(torch.log_softmax(theta2, -1), ref), theta2)
    torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("use", ["loss", "reward"])
def test_values(use):
    theta, ref = setting()
    logp = torch.log_softmax(theta, -1)
    exact = kl(logp, ref).detach()
    ell = (logp - ref).detach()
    for estimator, value in (("k1", ell), ("k2", ell**2 / 2), ("k3", torch.exp(-ell) - 1 + ell)):
        got = kl_estimate(logp, ref, estimator=estimator, use=use)
        torch.testing.assert_close(got.detach(), value)
        if estimator != "k2":
            torch.testing.assert_close((logp.exp() * got).sum().detach(), exact)  # unbiased
        assert got.requires_grad == (use == "loss")


def test_the_naive_loss_has_another_gradient():
    """Why the surrogate is there: k3, differentiated, pulls towards the reference's divergence the other way round."""
    theta, ref = setting()
    logp = torch.log_softmax(theta, -1)
    naive = torch.exp(ref - logp) - 1 + logp - ref
    (gradient,) = torch.autograd.grad((logp.detach().exp() * naive).sum(), theta)
    theta2, _ = setting()
    log_q = torch.log_softmax(theta2, -1)
    (backwards,) = torch.autograd.grad(kl(ref, log_q), theta2)
    torch.testing.assert_close(gradient, backwards)


def test_k3_does_not_cancel_and_can_be_bounded():
    logp = torch.tensor([0.0, 0.0])
    tiny = kl_estimate(logp, torch.tensor([1e-4, -1e-4]), use="reward")
    torch.testing.assert_close(tiny, torch.full((2,), 5e-9), rtol=1e-3, atol=0)
    far = torch.tensor([-200.0, 0.0])
    assert kl_estimate(far, logp, use="reward")[0].isinf()
    assert kl_estimate(far, logp, use="reward", clamp=10.0)[0] == pytest.approx(torch.expm1(torch.tensor(10.0)).item() - 10, rel=1e-6)


@pytest.mark.parametrize("change, error", [
    ({"estimator": "k4"}, ValueError), ({"use": "both"}, ValueError), ({"clamp": 0.0}, ValueError),
    ({"logp": torch.zeros(3, dtype=torch.bfloat16)}, TypeError), ({"ref_logp": torch.zeros(4)}, ValueError),
])  # fmt: skip
def test_what_does_not_fit_is_said(change, error):
    with pytest.raises(error):
        kl_estimate(**{"logp": torch.zeros(3), "ref_logp": torch.zeros(3), **change})
