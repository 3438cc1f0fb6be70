"""ema_update and EMA: the arithmetic, the state, and that nothing is changed when something is wrong."""

import copy
import io

import pytest
import torch
from torch import nn

import pymerge
from pymerge import EMA, ema_update


class Net(nn.Module):
    """Tied weights, a float buffer and an integer buffer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.to(dtype)

    def train_step(self, seed):
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn(p.shape, generator=g).to(p.dtype) * 0.1)
            self.norm.running_mean.fill_(float(seed))
            self.norm.num_batches_tracked += 1


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------------------------------------
# ema_update


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_is_the_formula(dtype):
    ema, model = torch.randn(100), torch.randn(100).to(dtype)
    want = 0.9 * ema.double() + 0.1 * model.double()
    assert ema_update(ema, model, decay=0.9) is None
    torch.testing.assert_close(ema, want.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("each_backend")
def test_agrees_with_torch():
    from torch.optim.swa_utils import get_ema_avg_fn

    ema, model = torch.randn(1000), torch.randn(1000)
    want = get_ema_avg_fn(0.999)(ema, model, 1)
    ema_update(ema, model, decay=0.999)
    torch.testing.assert_close(ema, want, rtol=1e-6, atol=1e-7)


def test_ends_and_fixed_points_are_exact():
    ema, model = torch.randn(50), torch.randn(50)
    kept = ema.clone()
    ema_update(ema, model, decay=1.0)
    assert torch.equal(ema, kept)
    ema_update(ema, model, decay=0.0)
    assert torch.equal(ema, model)
    ema_update(ema, model, decay=0.1234)
    assert torch.equal(ema, model)


def test_of_state_dicts_and_modules():
    a, b = Net(), Net()
    b.train_step(3)
    shadow = {k: v.clone() for k, v in a.state_dict().items() if k != "head.weight"}
    shadow["head.weight"] = shadow["embed.weight"]
    ema_update(shadow, b.state_dict(), decay=0.5)
    ema_update(a, b, decay=0.5)
    assert same(state(a), shadow)
    assert shadow["norm.num_batches_tracked"] == 1  # integers are copied
    assert shadow["norm.running_mean"][0] == 1.5


def test_bf16_average_moves_in_fp32_only():
    shadow, model = torch.zeros(10), torch.ones(10, dtype=torch.bfloat16)
    half = torch.zeros(10, dtype=torch.bfloat16)
    for _ in range(1000):
        ema_update(shadow, model, decay=0.999)
        ema_update(half, model, decay=0.999)
    assert abs(shadow[0].item() - (1 - 0.999**1000)) < 1e-4
    assert half[0] < 0.5


def test_update_of_strided_tensors():
    whole = torch.zeros(6, 8)
    ema_update(whole[:, ::2], torch.ones(6, 4), decay=0.5)
    assert torch.equal(whole, torch.tensor([0.5, 0.0]).repeat(6, 4))


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda m: m["z"].fill_(float("nan")), pymerge.NonFiniteError, "model: 'z' has 3 non-finite value\\(s\\)"),
        (lambda m: m.update(z=torch.zeros(4)), ValueError, "model: 'z' is \\(4,\\), ema is \\(3,\\)"),
        (lambda m: m.pop("z"), ValueError, "model lacks 'z'"),
        (lambda m: m.update(z=torch.zeros(3, dtype=torch.int64)), TypeError, "model: 'z' is int64, ema is float32"),
    ],
)
def test_errors_leave_the_average_alone(spoil, error, words):
    ema = {"a": torch.zeros(3), "z": torch.zeros(3)}
    model = {"a": torch.ones(3), "z": torch.ones(3)}
    spoil(model)
    with pytest.raises(error, match=words):
        ema_update(ema, model, decay=0.5)
    assert not ema["a"].any() and not ema["z"].any()


def test_shared_memory_is_an_error():
    model = Net()
    with pytest.raises(ValueError, match="ema: 'head.bias' shares memory with model's 'head.bias'"):
        ema_update(model.state_dict(), model.state_dict(), decay=0.9)
    w = torch.zeros(3)
    with pytest.raises(ValueError, match="ema: 'a' and 'b' share memory and are not tied in every model"):
        ema_update({"a": w, "b": w}, {"a": torch.ones(3), "b": torch.zeros(3)}, decay=0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_range(decay):
    with pytest.raises(ValueError, match="decay is .*; it must be between 0 and 1"):
        ema_update(torch.zeros(1), torch.zeros(1), decay=decay)
    with pytest.raises(ValueError, match="decay is"):
        EMA(Net(), decay)


# ---------------------------------------------------------------------------------------------------------------------------------------
# EMA


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_class_follows_the_formula(dtype):
    model = Net(dtype)
    want = {k: v.double().clone() for k, v in model.state_dict().items()}
    ema = EMA(model, decay=0.8)
    for step in range(5):
        model.train_step(step)
        ema.update(model)
        want = {k: 0.8 * want[k] + 0.2 * v.double() for k, v in model.state_dict().items()}
    tensors = ema.state_dict()["tensors"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("embed.weight", "head.bias", "norm.weight"):
        assert tensors[name].dtype == wide
        torch.testing.assert_close(tensors[name].double(), want[name], rtol=1e-6, atol=1e-6)
    assert tensors["embed.weight"] is tensors["head.weight"]
    assert tensors["norm.running_mean"][0] == 4.0 and tensors["norm.num_batches_tracked"] == 5


def test_copy_to_rounds_to_the_models_dtype():
    model, other = Net(torch.bfloat16), Net(torch.bfloat16)
    ema = EMA(model, decay=0.7)
    model.train_step(1)
    ema.update(model)
    ema.copy_to(other)
    assert other.head.weight is other.embed.weight
    assert same(state(other), {k: v.to(other.state_dict()[k].dtype) for k, v in ema.state_dict()["tensors"].items()})


def test_applied_swaps_and_restores():
    model = Net()
    ema = EMA(model, decay=0.5)
    initial = state(model)
    model.train_step(1)
    own, parameters = state(model), list(model.parameters())
    with pytest.raises(KeyError), ema.applied(model) as inside:
        assert inside is model and same({k: state(model)[k] for k in ("embed.weight",)}, {"embed.weight": initial["embed.weight"]})
        with pytest.raises(RuntimeError, match="update\\(\\) inside applied\\(\\)"):
            ema.update(model)
        raise KeyError
    assert same(state(model), own) and all(p is q for p, q in zip(parameters, model.parameters()))
    ema.update(model)


def test_warmup_and_schedule():
    ema = EMA(Net(), decay=0.9, warmup=True)
    assert ema.decay_at(1) == 0.0
    assert ema.decay_at(9) == pytest.approx(1 - 9 ** (-2 / 3))
    assert ema.decay_at(10**6) == 0.9
    late = EMA(Net(), decay=0.9, update_after_step=10)
    assert [late.decay_at(s) for s in (1, 10, 11)] == [0.0, 0.0, 0.9]


def test_update_every():
    model = Net()
    ema = EMA(model, decay=0.5, update_every=3)
    before = ema.state_dict()["tensors"]["head.bias"].clone()
    moved = []
    for step in range(6):
        model.train_step(step)
        ema.update(model)
        now = ema.state_dict()["tensors"]["head.bias"].clone()
        moved.append(not torch.equal(now, before))
        before = now
    assert moved == [False, False, True] * 2 and ema.step == 6


def test_resume_is_exact():
    model = Net(torch.bfloat16)
    ema = EMA(model, decay=0.99, warmup=True)
    for step in range(3):
        model.train_step(step)
        ema.update(model)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    resumed = EMA(copy.deepcopy(model), decay=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        model.train_step(step)
        ema.update(model)
        resumed.update(model)
    assert resumed.step == 6 and resumed.decay == 0.99 and resumed.warmup
    assert same(ema.state_dict()["tensors"], resumed.state_dict()["tensors"])


def test_a_bad_step_changes_nothing():
    model = Net()
    ema = EMA(model, decay=0.5)
    model.train_step(1)
    before = {k: v.clone() for k, v in ema.state_dict()["tensors"].items()}
    with torch.no_grad():
        model.norm.bias[1] = float("inf")
    with pytest.raises(pymerge.NonFiniteError, match="model: 'norm.bias' has 1 non-finite value"):
        ema.update(model)
    assert ema.step == 0 and same(ema.state_dict()["tensors"], before)
    EMA(Net(), check_finite=False).update(model)


def test_buffers_may_hold_infinities():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    ema = EMA(model, decay=0.5)
    ema.update(model)
    assert ema.state_dict()["tensors"]["mask"].tolist() == [0.0, float("-inf")]


def test_errors_of_the_class():
    with pytest.raises(TypeError, match="model is a dict; EMA follows an nn.Module"):
        EMA({"w": torch.zeros(1)})
    ema = EMA(Net())
    with pytest.raises(ValueError, match="model lacks 'embed.weight'"):
        ema.update(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="state of an EMA lacks 'step'"):
        ema.load_state_dict({"tensors": {}})
    with pytest.raises(ValueError, match="update_every 0"):
        EMA(Net(), update_every=0)
    with pytest.raises(ValueError, match="inv_gamma is 0"):
        EMA(Net(), inv_gamma=0)


def test_training_goes_on_after_a_swap():
    """The optimizer's parameters are the same objects, with gradients that still work."""
    model = nn.Linear(3, 1)
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.1), EMA(model, decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        ema.update(model)
        with ema.applied(model):
            assert torch.equal(model.weight, ema.state_dict()["tensors"]["weight"])
