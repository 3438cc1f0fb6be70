"""breadcrumbs and breadcrumbs_ties against a stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pymerge
from tests.oracles import deltas as oracle
from tests.oracles import mergekit


@pytest.fixture(autouse=True)
def _(each_backend):
    pass


FRACTIONS = st.one_of(st.sampled_from([0.0, 0.01, 0.29, 0.5, 0.9, 1.0]), st.floats(0, 1))


@given(st.integers(0, 300), st.integers(1, 4), FRACTIONS, FRACTIONS, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_against_a_stable_sort(n, count, density, gamma, elect, coarse, normalize, seed):
    """Coarse values have many equal magnitudes, at both ends of the band."""
    rng = np.random.default_rng(seed)
    base, *models = (
        rng.integers(-4, 5, n).astype(np.float32) if coarse else rng.normal(size=n).astype(np.float32) for _ in range(count + 1)
    )
    weights = [1.0, 0.5, -0.25, 2.0][:count]
    want = mergekit.merge(base, models, weights, 0.5, lambda i, d: oracle.band(d, density, gamma), elect=elect, normalize=normalize)
    convention = pymerge.Convention(divisor="weights" if normalize else "none", k="floor")
    method = pymerge.breadcrumbs_ties if elect else pymerge.breadcrumbs
    got = method(
        torch.from_numpy(base), [torch.from_numpy(x) for x in models], weights=weights, density=density, gamma=gamma, scale=0.5,
        convention=convention,
    )  # fmt: skip
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)


def test_by_hand():
    base = torch.zeros(5)
    x = torch.tensor([0.1, -9.0, 2.0, -3.0, 1.0])
    assert pymerge.breadcrumbs(base, [x], density=0.4, gamma=0.2).tolist() == [0.0, 0.0, 2.0, -3.0, 0.0]
    assert pymerge.breadcrumbs(base, [x], density=0.4, gamma=0.0).tolist() == [0.0, -9.0, 0.0, -3.0, 0.0]
    assert torch.equal(pymerge.breadcrumbs(base, [x], density=1.0, gamma=0.5), x)
    # Too few are left below the outliers: the band reaches up.
    assert pymerge.breadcrumbs(base, [x], density=0.8, gamma=0.8).tolist() == [x[0], 0.0, 2.0, -3.0, 1.0]
    y = torch.tensor([0.0, 0.0, -1.0, 1.0, 0.0])
    assert pymerge.breadcrumbs_ties(base, [x, y], density=0.4, gamma=[0.2, 0.0]).tolist() == [0.0, 0.0, 2.0, -3.0, 0.0]
    assert pymerge.breadcrumbs(base, [x, y], density=0.4, gamma=[0.2, 0.0]).tolist() == [0.0, 0.0, 1.0, -2.0, 0.0]


def test_small_tensors_keep_their_delta():
    """An older mergekit lost the whole delta where int(gamma * n) is 0."""
    out = pymerge.breadcrumbs(torch.zeros(10), [torch.arange(10.0)], density=0.9, gamma=0.01)
    assert out.tolist() == [0.0, *range(1, 10)]


def test_rescale_restores_the_norm():
    x = torch.randn(3000)
    convention = pymerge.Convention(divisor="none", k="floor", rescale="norm")
    out = pymerge.breadcrumbs(torch.zeros(3000), [x], density=0.5, gamma=0.1, convention=convention)
    assert (out != 0).sum() == 1500
    torch.testing.assert_close(out.abs().sum(), x.abs().sum(), rtol=1e-5, atol=0)


def test_errors():
    x = torch.ones(4)
    with pytest.raises(ValueError, match=r"gamma of model 1 is 1.5; gamma is the fraction of the largest left out, between 0 and 1"):
        pymerge.breadcrumbs(x, [x, x], gamma=[0.1, 1.5])
    with pytest.raises(ValueError, match="density of model 0 is -0.1"):
        pymerge.breadcrumbs(x, [x], density=-0.1)
    with pytest.raises(ValueError, match='breadcrumbs ranks within each tensor; pass a Convention of scope "tensor"'):
        pymerge.breadcrumbs({"w": x}, [{"w": x}], convention=pymerge.Convention(scope="model"))
    with pytest.raises(ValueError, match="convention 'peft' does not define 'breadcrumbs'"):
        pymerge.breadcrumbs(x, [x], convention="peft")
