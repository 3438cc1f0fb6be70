import copy

import pytest
import torch
from torch import nn

from pymerge.losses import AdaptiveKLController, KLRegularizer, kl_divergence


def model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(11, 8), nn.Dropout(dropout), nn.Linear(8, 11))


def frozen(m):
    return copy.deepcopy(m).requires_grad_(False)


TOKENS = torch.arange(8).view(2, 4)


def test_the_penalty_pulls_back_to_the_reference():
    m = model()
    regularizer = KLRegularizer(frozen(m), beta=0.5)
    assert regularizer.check_zero_at_start(m, TOKENS) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        m[2].weight.add_(torch.randn_like(m[2].weight))
    before = regularizer(m(TOKENS), TOKENS)
    want = 0.5 * kl_divergence(m(TOKENS), regularizer.reference(TOKENS), direction="forward")
    torch.testing.assert_close(before, want)
    optimizer = torch.optim.SGD(m.parameters(), 1.0)
    for _ in range(20):
        optimizer.zero_grad()
        regularizer(m(TOKENS), TOKENS).backward()
        optimizer.step()
    assert regularizer(m(TOKENS), TOKENS) < 0.5 * before
    with pytest.raises(ValueError, match="before training is"):
        regularizer.check_zero_at_start(model(1), TOKENS)


def test_the_reference_runs_without_dropout_and_keeps_its_mode():
    reference = frozen(model(dropout=0.9))
    reference.train()
    reference[2].eval()
    regularizer = KLRegularizer(reference)
    assert torch.equal(regularizer.reference_logits(TOKENS), regularizer.reference_logits(TOKENS))
    assert reference.training and reference[1].training and not reference[2].training


def test_strength_zero_does_not_run_the_reference():
    class Fails(nn.Module):
        def forward(self, x):
            raise AssertionError

    logits = torch.zeros(1, 4, requires_grad=True)
    loss = KLRegularizer(Fails(), beta=0.0)(logits, TOKENS)
    loss.backward()
    assert loss.item() == 0


def test_a_reference_that_trains_is_refused():
    with pytest.raises(ValueError, match="freeze it"):
        KLRegularizer(model())
    with pytest.raises(ValueError, match="disable_adapter"):
        KLRegularizer(model(), adapter_off=True)
    with pytest.raises(ValueError, match="beta"):
        KLRegularizer(frozen(model()), beta=-1)


def test_a_peft_model_is_its_own_reference():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    regularizer = KLRegularizer(tuned, adapter_off=True)
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.zeros(2, 4),
    }
    assert regularizer.check_zero_at_start(tuned, batch) == pytest.approx(0, abs=1e-6)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    logits = tuned(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    penalty = regularizer(logits, batch)
    penalty.backward()
    assert penalty > 0 and any(p.grad is not None and p.grad.count_nonzero() for n, p in tuned.named_parameters() if "lora_" in n)
    # Tokens that the attention mask leaves out do not count.
    other = logits.detach().clone()
    other[1, 2:] += torch.randn_like(other[1, 2:])
    torch.testing.assert_close(regularizer(other, batch), penalty.detach())
    next(p for n, p in tuned.named_parameters() if "embed" in n).requires_grad_()
    with pytest.raises(ValueError, match="outside the adapter"):
        KLRegularizer(tuned, adapter_off=True)


def test_the_controller_holds_a_target():
    controller = AdaptiveKLController(0.1, target=2.0, horizon=100)
    assert controller.update(2.0, 10) == pytest.approx(0.1)
    assert controller.update(2.2, 10) == pytest.approx(0.1 * 1.01)
    assert controller.update(100.0, 10) == pytest.approx(0.1 * 1.01 * 1.02)
    assert controller.update(0.0, 10**6) > 0  # a horizon overrun many times does not turn it negative
    again = AdaptiveKLController(1.0, 2.0, 100)
    again.load_state_dict(controller.state_dict())
    assert again.value == controller.value
    assert KLRegularizer(frozen(model()), controller).beta == controller.value
    with pytest.raises(ValueError, match="nan"):
        controller.update(float("nan"))
    with pytest.raises(ValueError, match="positive"):
        AdaptiveKLController(0.1, 0.0, 100)
