"""DARE: what the random mask depends on, and that it is unbiased."""

import pytest
import torch

import pymerge


@pytest.fixture(autouse=True)
def _(each_backend):
    pass


def mask(n=2000, name="w", seed=0, density=0.5, place=0, count=3):
    """Kept elements of the model at `place`, whose delta is 1 everywhere; the others have none."""
    base = {name: torch.zeros(n)}
    models = [{name: torch.full((n,), float(i == place))} for i in range(count)]
    return pymerge.dare_linear(base, models, density=density, seed=seed)[name] != 0


def test_seed_name_and_place_change_the_mask():
    assert torch.equal(mask(), mask())
    for other in (mask(seed=1), mask(seed=2**63), mask(name="v"), mask(place=1)):
        assert 800 < (other != mask()).sum() < 1200


def test_length_shape_and_company_do_not_change_the_mask():
    assert torch.equal(mask(n=100), mask()[:100])
    assert torch.equal(mask(count=1), mask())
    x = torch.ones(20, 100)
    alone = pymerge.dare_linear({"w": torch.zeros(20, 100)}, [{"w": x}])["w"]
    among = pymerge.dare_linear({"a": torch.zeros(3), "w": torch.zeros(20, 100)}, [{"a": torch.ones(3), "w": x}])["w"]
    assert torch.equal(alone, among) and torch.equal(alone.reshape(-1) != 0, mask())


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_unbiased(density):
    n = 100_000
    out = pymerge.dare_linear(torch.zeros(n), [torch.ones(n)], density=density, seed=5)
    values = out.unique()
    assert len(values) == 2 and values[0] == 0
    torch.testing.assert_close(values[1], torch.tensor(1 / density), rtol=1e-6, atol=0)
    sigma = ((1 - density) / density / n) ** 0.5
    assert abs(out.mean().item() - 1) < 5 * sigma


def test_density_zero_and_one():
    base, a = torch.randn(50), torch.randn(50)
    assert torch.equal(pymerge.dare_linear(base, [a], density=0.0), base)
    assert torch.equal(pymerge.dare_linear(base, [a], density=1.0), pymerge.task_arithmetic(base, [a]))
    assert torch.equal(pymerge.dare_ties(base, [a], density=1.0), pymerge.task_arithmetic(base, [a]))


def test_norm_rescale_keeps_the_l1_norm():
    x = torch.randn(5000)
    out = pymerge.dare_linear(torch.zeros(5000), [x], density=0.3, convention="mergekit")
    torch.testing.assert_close(out.abs().sum(), x.abs().sum(), rtol=1e-5, atol=0)


def test_densities_per_model():
    base, models = torch.zeros(4000), [torch.full((4000,), 1.0), torch.full((4000,), 100.0)]
    out = pymerge.dare_linear(base, models, density=[1.0, 0.25])
    assert (out >= 1).all() and 850 < (out > 1).sum() < 1150
