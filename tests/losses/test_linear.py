"""From hidden states: the value and gradients of the plain way, without its memory."""

import pytest
import torch

from pymerge.losses import kl_divergence, linear_kl_divergence


def layers(tokens=(2, 7), width=6, ref_width=4, vocab=19, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return make(*tokens, width), make(vocab, width), make(*tokens, ref_width), make(vocab, ref_width), make(vocab), make(vocab)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("reduction", ["token_mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_plain_way_s_value_and_gradients(direction, reduction, chunk):
    h, w, rh, rw, b, rb = layers()
    labels = torch.tensor([[0, -100, 1, 2, 3, 4, -100]] * 2)
    options = {"direction": direction, "beta": 0.3, "temperature": 1.5, "scale_by_t2": True, "labels": labels, "reduction": reduction}
    inputs = [x.clone().requires_grad_() for x in (h, w, b)]
    got = linear_kl_divergence(inputs[0], inputs[1], rh, rw, bias=inputs[2], ref_bias=rb, chunk_tokens=chunk, **options)
    plain = [x.clone().requires_grad_() for x in (h, w, b)]
    want = kl_divergence(plain[0] @ plain[1].t() + plain[2], rh @ rw.t() + rb, **options)
    torch.testing.assert_close(got, want)
    upstream = torch.rand_like(want) + 0.5
    for x, y in zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, plain, upstream)):
        torch.testing.assert_close(x, y)


def test_gradcheck():
    h, w, rh, rw, b, _ = layers(tokens=(3,), vocab=5)
    for reduction in ("token_mean", "none"):
        assert torch.autograd.gradcheck(
            lambda x, y, z, r=reduction: linear_kl_divergence(x, y, rh, rw, bias=z, chunk_tokens=2, reduction=r),
            [x.requires_grad_() for x in (h, w, b)],
        )


def test_the_graph_can_be_used_twice():
    h, w, rh, rw, *_ = layers()
    h.requires_grad_()
    loss = linear_kl_divergence(h, w, rh, rw)
    first = torch.autograd.grad(loss, h, torch.tensor(3.0), retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0] * 3, first)


def test_bf16_sums_its_weight_gradient_in_fp32():
    h, w, rh, rw, *_ = layers(tokens=(512,), width=8, ref_width=8, vocab=33, dtype=torch.bfloat16)
    w.requires_grad_()
    linear_kl_divergence(h, w, rh, rw, chunk_tokens=16, reduction="sum").backward()
    exact = w.detach().double().requires_grad_()
    kl_divergence(h.double() @ exact.t(), rh.double() @ rw.double().t(), reduction="sum").backward()
    assert (w.grad.double() - exact.grad).norm() / exact.grad.norm() < 0.01


def test_nothing_of_tokens_times_vocabulary_is_made():
    """Every tensor that any operation makes, forward and backward, is watched."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, vocab, chunk = 96, 500, 8

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor):
                    self.largest = max(self.largest, t.numel())
            return result

    h, w, rh, rw, *_ = layers(tokens=(tokens,), width=4, vocab=vocab, dtype=torch.bfloat16)
    h.requires_grad_(), w.requires_grad_()
    with Watch() as watch:
        linear_kl_divergence(h, w, rh, rw, chunk_tokens=chunk).backward()
    assert watch.largest <= chunk * vocab


def test_masked_tokens_are_not_computed():
    h, w, rh, rw, *_ = layers(dtype=torch.float32)
    h[0, 0] = float("nan")
    h.requires_grad_()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 0] = False
    loss = linear_kl_divergence(h, w, rh, rw, mask=mask)
    loss.backward()
    assert loss.isfinite() and h.grad.isfinite().all() and h.grad[0, 0].count_nonzero() == 0
    none = linear_kl_divergence(h, w, rh, rw, mask=torch.zeros(2, 7, dtype=torch.bool))
    none.backward()
    assert none.item() == 0


@pytest.mark.parametrize("change, error, message", [
    ({"ref_hidden": torch.zeros(3, 4, dtype=torch.float64)}, ValueError, "same tokens"),
    ({"ref_weight": torch.zeros(7, 4, dtype=torch.float64)}, ValueError, "19 and 7 entries"),
    ({"weight": torch.zeros(19, 5, dtype=torch.float64)}, ValueError, "hidden is"),
    ({"weight": torch.zeros(19, 6)}, TypeError, "one dtype"),
    ({"bias": torch.zeros(3)}, ValueError, "bias is"),
    ({"chunk_tokens": 0}, ValueError, "chunk_tokens"),
    ({"direction": "x"}, ValueError, "no divergence"),
])  # fmt: skip
def test_what_does_not_fit_is_said(change, error, message):
    h, w, rh, rw, *_ = layers()
    arguments = {"hidden": h, "weight": w, "ref_hidden": rh, "ref_weight": rw, **change}
    with pytest.raises(error, match=message):
        linear_kl_divergence(**arguments)
