"""Values against torch.distributions, gradients against finite differences, and every way to reduce and mask."""

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as exact

from pymerge.losses import kl_divergence

DIRECTIONS = ("forward", "reverse", "jsd")


def pair(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2))


def definition(logits, ref, direction, temperature=1.0, beta=0.5):
    q, p = Categorical(logits=logits / temperature), Categorical(logits=ref / temperature)
    if direction == "forward":
        return exact(p, q)
    if direction == "reverse":
        return exact(q, p)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * exact(p, m) + (1 - beta) * exact(q, m)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_values_and_temperature(direction):
    logits, ref = pair(4, 5, 9)
    want = definition(logits, ref, direction, 2.0, 0.3)
    got = kl_divergence(logits, ref, direction=direction, temperature=2.0, beta=0.3, reduction="none")
    torch.testing.assert_close(got, want)
    scaled = kl_divergence(logits, ref, direction=direction, temperature=2.0, beta=0.3, scale_by_t2=True)
    torch.testing.assert_close(scaled, 4 * want.mean())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["token_mean", "sum", "batch_mean", "none"])
def test_gradients_in_fp64(direction, reduction):
    logits, ref = (x.requires_grad_() for x in pair(2, 3, 5))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda a, b: kl_divergence(a, b, direction=direction, mask=mask, reduction=reduction), (logits, ref))


def test_reductions_divide_by_what_they_say():
    logits, ref = pair(2, 3, 7)
    labels = torch.tensor([[-100, 1, 2], [3, -100, -100]])
    per_token = definition(logits, ref, "reverse") * (labels != -100)
    torch.testing.assert_close(kl_divergence(logits, ref, labels=labels, reduction="none"), per_token)
    for reduction, by in (("sum", 1), ("token_mean", 3), ("batch_mean", 2)):
        torch.testing.assert_close(kl_divergence(logits, ref, labels=labels, reduction=reduction), per_token.sum() / by)
    # Micro-batches that share num_items add up to the whole, however they are split.
    parts = [kl_divergence(logits[i : i + 1], ref[i : i + 1], labels=labels[i : i + 1], num_items=3) for i in range(2)]
    torch.testing.assert_close(sum(parts), per_token.sum() / 3)
    weights = torch.tensor([[0.0, 0.5, 1.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        kl_divergence(logits, ref, mask=weights).double(), (definition(logits, ref, "reverse") * weights).sum() / 3.5
    )


def test_mask_and_labels_both_count():
    logits, ref = pair(1, 4, 5)
    labels, mask = torch.tensor([[-100, 1, 1, -100]]), torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(kl_divergence(logits, ref, labels=labels, mask=mask), definition(logits, ref, "reverse")[0, 1])


@pytest.mark.parametrize("reduction", ["token_mean", "sum", "batch_mean"])
def test_nothing_that_counts_is_zero_with_a_graph(reduction):
    logits, ref = pair(2, 3, 5, dtype=torch.float32)
    logits[0, 0] = float("nan")
    logits.requires_grad_()
    loss = kl_divergence(logits, ref, mask=torch.zeros(2, 3, dtype=torch.bool), reduction=reduction)
    loss.backward()
    assert loss.item() == 0 and logits.grad.count_nonzero() == 0


def test_normalized_jsd_tends_to_the_plain_divergences():
    logits, ref = pair(6, 11)
    for beta, direction in ((1e-6, "forward"), (1 - 1e-6, "reverse")):
        got = kl_divergence(logits, ref, direction="jsd", beta=beta, normalize=True)
        torch.testing.assert_close(got, definition(logits, ref, direction).mean(), rtol=1e-4, atol=1e-5)


def test_impossible_tokens():
    logits, ref = pair(1, 5)
    logits[0, 2] = ref[0, 2] = -torch.inf
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(kl_divergence(logits, ref), definition(logits[:, kept], ref[:, kept], "reverse")[0])
    ref[0, 0] = -torch.inf
    assert kl_divergence(logits, ref).isinf() and kl_divergence(logits, ref, direction="forward").isfinite()


@pytest.mark.parametrize("change, message", [
    ({"direction": "kl"}, "'kl' is no divergence"),
    ({"direction": "jsd", "beta": 1.0}, "beta is 1.0"),
    ({"normalize": True}, "only direction='jsd'"),
    ({"reduction": "mean"}, "reduction"),
    ({"reduction": "sum", "num_items": 3}, "num_items"),
    ({"temperature": 0.0}, "temperature"),
    ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels is \(4,\)"),
    ({"mask": torch.ones(2)}, r"mask is \(2,\)"),
])  # fmt: skip
def test_what_does_not_fit_is_said(change, message):
    logits, ref = pair(3, 5)
    with pytest.raises(ValueError, match=message):
        kl_divergence(logits, ref, **change)
