"""Against mergekit 0.1.5 itself, in fp32: the same bytes, except where it leaves open which of equal magnitudes is kept.

mergekit rounds to the working dtype after every step, pymerge once at the store; so half precision is compared with its documented precise
mode (dtype float32, out_dtype bfloat16), which does the same.
"""

import pytest
import torch

import pymerge

merge_tensors = pytest.importorskip("mergekit.merge_methods").merge_tensors


def models(dtype=torch.float32, n=4099, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = (torch.randn(n, generator=g) * 0.02).to(dtype)
    return base, [(base.float() + torch.randn(n, generator=g) * 5e-4).to(dtype) for _ in range(count)]


def theirs(method, base, xs, *, weights, density=None, out_dtype=None, shared=None):
    inputs, offset = ([base, *xs], 1) if base is not None else (xs, 0)
    parameters = {"weight": {i + offset: w for i, w in enumerate(weights)}, **(shared or {})}
    if density is not None:
        parameters["density"] = {i + offset: density for i in range(len(xs))}
    return merge_tensors(
        inputs, method, ids=list(range(len(inputs))), parameters=parameters, base_index=0 if base is not None else None,
        dtype=torch.float32, out_dtype=out_dtype,
    )  # fmt: skip


@pytest.mark.parametrize("density", [0.05, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 1.7, 0.5), (1.0, -0.5, 0.25)])
@pytest.mark.usefixtures("each_backend")
def test_ties(density, weights):
    base, xs = models()
    want = theirs("ties", base, xs, weights=weights, density=density, shared={"lambda": 0.8})
    got = pymerge.ties(base, xs, weights=weights, density=density, scale=0.8)
    assert torch.equal(got, want)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -1.7, 0.5)])
@pytest.mark.usefixtures("each_backend")
def test_task_arithmetic(weights):
    base, xs = models()
    assert torch.equal(pymerge.task_arithmetic(base, xs, weights), theirs("task_arithmetic", base, xs, weights=weights))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.usefixtures("each_backend")
def test_linear(normalize):
    """mergekit adds with fused multiply-adds here, so the last bit may differ."""
    _, xs = models()
    want = theirs("linear", None, xs, weights=(0.3, 1.7, 0.5), shared={"normalize": normalize})
    torch.testing.assert_close(pymerge.linear(xs, weights=(0.3, 1.7, 0.5), normalize=normalize), want, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("far", [1e-3, 1.0])
@pytest.mark.usefixtures("each_backend")
def test_slerp(t, far):
    g = torch.Generator().manual_seed(2)
    a = torch.randn(33, 65, generator=g)
    b = a + far * torch.randn(33, 65, generator=g)
    want = merge_tensors([a, b], "slerp", parameters={"t": t}, base_index=0)
    torch.testing.assert_close(pymerge.slerp(a, b, t=t), want, rtol=2e-6, atol=2e-6)


def test_slerp_of_zeros_and_of_opposites():
    a = torch.randn(50, generator=torch.Generator().manual_seed(3))
    for x, y in [(a, a * 0), (a * 0, a), (a * 0, a * 0), (a, -a), (a, a)]:
        want = merge_tensors([x, y], "slerp", parameters={"t": 0.3}, base_index=0)
        torch.testing.assert_close(pymerge.slerp(x, y, t=0.3), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.usefixtures("each_backend")
def test_ties_in_bf16_keeps_the_right_number(density):
    """Percents of bf16 deltas share the threshold's magnitude: elsewhere the bytes agree, and exactly k of each model are kept."""
    base, xs = models(torch.bfloat16)
    n, k = base.numel(), int(density * base.numel())
    deltas = [x.float() - base.float() for x in xs]
    thresholds = [d.abs().sort(descending=True).values[k - 1] for d in deltas]
    tied = torch.stack([d.abs() == t for d, t in zip(deltas, thresholds)]).any(0)
    assert 0.001 * n < tied.sum() < 0.5 * n
    want = theirs("ties", base, xs, weights=(1.0, 1.0, 1.0), density=density, out_dtype=torch.bfloat16)
    got = pymerge.ties(base, xs, density=density)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[~tied], want[~tied])
    for x, d, t in zip(xs, deltas, thresholds):
        change = pymerge.ties(base, [x], density=density, dtype=torch.float32) - base.float()
        kept = change != 0
        assert kept.sum() == k and kept[d.abs() > t].all() and not kept[d.abs() < t].any()
        # Of the equal ones, the first are kept.
        where = torch.nonzero(d.abs() == t).reshape(-1)
        count = int(kept[where].sum())
        assert kept[where[:count]].all()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_agrees_in_distribution(method):
    """Other random numbers, the same law: with the L1 norm kept, the mean over seeds goes to the sum of the deltas (linear), and ours
    spreads as much around it as theirs."""
    base, xs = models(n=20000, count=2)
    torch.manual_seed(0)
    want = torch.stack([theirs(method, base, xs, weights=(1.0, 1.0), density=0.5) - base for _ in range(20)])
    got = torch.stack([getattr(pymerge, method)(base, xs, density=0.5, seed=s, convention="mergekit") - base for s in range(20)])
    torch.testing.assert_close(got.mean(0).norm(), want.mean(0).norm(), rtol=0.02, atol=0)
    torch.testing.assert_close(got.std(0).norm(), want.std(0).norm(), rtol=0.02, atol=0)
