"""Against PEFT's merge_utils themselves: the same bytes in fp32 without equal magnitudes."""

import pytest
import torch

import pymerge

merge_utils = pytest.importorskip("peft.utils.merge_utils")


def deltas(n=3001, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.zeros(n), [torch.randn(n, generator=g) for _ in range(count)]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.29, 0.77])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.1), (1.0, -1.0, 0.5)])
@pytest.mark.usefixtures("each_backend")
def test_ties(density, weights):
    base, xs = deltas()
    want = merge_utils.ties(xs, torch.tensor(weights), density)
    assert torch.equal(pymerge.ties(base, xs, weights=weights, density=density, convention="peft"), want)


@pytest.mark.usefixtures("each_backend")
def test_ties_by_frequency():
    base, xs = deltas()
    want = merge_utils.ties(xs, torch.ones(3), 0.4, "frequency")
    by_count = pymerge.Convention.preset("peft", "ties").replace(vote="count")
    assert torch.equal(pymerge.ties(base, xs, density=0.4, convention=by_count), want)


@pytest.mark.usefixtures("each_backend")
def test_task_arithmetic():
    base, xs = deltas()
    want = merge_utils.task_arithmetic(xs, torch.tensor([0.3, 1.0, -2.0]))
    assert torch.equal(pymerge.task_arithmetic(base, xs, [0.3, 1.0, -2.0]), want)


@pytest.mark.usefixtures("each_backend")
def test_magnitude_pruning_alone():
    base, xs = deltas(count=1)
    assert torch.equal(pymerge.ties(base, xs, density=0.3), merge_utils.magnitude_based_pruning(xs[0], 0.3))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.usefixtures("each_backend")
def test_dare_with_its_mask(method, monkeypatch):
    """PEFT's arithmetic with the draws of pymerge in place of its own."""
    from tests.oracles.philox import keep_mask

    base, xs = deltas()
    for density in (0.25, 0.4):
        masks = iter([torch.from_numpy(keep_mask(base.numel(), density, 9, "", i)) for i in range(3)])
        monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda like, masks=masks: next(masks).to(like.dtype))
        want = getattr(merge_utils, method)(xs, torch.tensor([1.0, 0.5, -2.0]), density)
        got = getattr(pymerge, method)(base, xs, weights=[1.0, 0.5, -2.0], density=density, seed=9, convention="peft")
        # It divides by the density, pymerge multiplies by 1/density: the same where that is a power of two.
        assert torch.equal(got, want) if density == 0.25 else torch.allclose(got, want, rtol=1e-6, atol=1e-6)
