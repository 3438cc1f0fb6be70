"""della and della_linear: the mask is the oracle's, what follows is mergekit's formula, the result is unbiased."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pymerge
from pymerge.merge_methods import flat
from tests.oracles import deltas as oracle
from tests.oracles import mergekit


@pytest.fixture(autouse=True)
def _(each_backend):
    pass


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 40)), st.integers(1, 3),
    st.sampled_from([(0.5, 0.15), (0.3, 0.0), (0.8, 0.2), (1.0, 0.15), (0.0, 0.1)]),
    st.sampled_from(["della", "della_linear"]), st.sampled_from(["default", "mergekit"]), st.booleans(), st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_against_the_oracle(shape, count, chances, method, convention, coarse, seed):
    rng = np.random.default_rng(seed)
    base, *models = ((rng.integers(-4, 5, shape) if coarse else rng.normal(size=shape)).astype(np.float64) for _ in range(count + 1))
    weights = [1.0, 0.5, -0.25][:count]
    drawn = [oracle.della_keep(x - base, *chances, seed, "w", i) for i, x in enumerate(models)]
    paper = convention == "default"

    def factor(delta, kept):
        return 1.0 if paper or not kept.any() else np.abs(delta).sum() / np.abs(kept).sum()

    # The oracle of the merge takes whole deltas: give it the ones that are divided by their chance already.
    grown = [base + (x - base) / (np.where(chance > 0, chance, 1) if paper else 1) for x, (_, chance) in zip(models, drawn)]
    want = mergekit.merge(
        base, grown, weights, 0.5, lambda i, d: drawn[i][0], elect=method == "della", normalize=method == "della", rescale=factor
    )
    got = getattr(pymerge, method)(
        {"w": torch.from_numpy(base)}, [{"w": torch.from_numpy(x)} for x in models], weights=weights, density=chances[0],
        epsilon=chances[1], scale=0.5, seed=seed, convention=convention,
    )["w"]  # fmt: skip
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


def test_unbiased_and_larger_deltas_are_kept_more_often():
    n, seeds = 50, 400
    x = torch.arange(1.0, n + 1)
    out = torch.stack([pymerge.della_linear(torch.zeros(n), [x], density=0.5, epsilon=0.3, seed=s) for s in range(seeds)])
    kept = (out != 0).double().mean(0)
    assert abs(kept[:10].mean() - 0.255) < 0.04 and abs(kept[-10:].mean() - 0.745) < 0.04
    assert abs(out.double().mean() / x.double().mean() - 1) < 0.03
    torch.testing.assert_close(out.max(0).values, x / torch.linspace(0.2, 0.8, n), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 1), (2, 3, 4), (2, 0)])
def test_every_shape(shape):
    """mergekit fails on rows of one element and on scalars, and ranks 3-D tensors along the middle."""
    base, x = torch.zeros(shape), torch.ones(shape)
    for method in (pymerge.della, pymerge.della_linear):
        for convention in ("default", "mergekit"):
            out = method(base, [x, x], density=0.6, convention=convention)
            assert out.shape == base.shape and out.isfinite().all()
    if x.dim() == 3:
        same = pymerge.della_linear({"w": base.view(6, 4)}, [{"w": x.view(6, 4)}])["w"]
        assert torch.equal(pymerge.della_linear({"w": base}, [{"w": x}])["w"].view(6, 4), same)


def test_bf16_ranks_are_not_rounded():
    """Row lengths beyond 256 are no integers of bf16; the chance of every rank is right all the same."""
    base, x = torch.zeros(5000, dtype=torch.bfloat16), torch.linspace(1, 2, 5000).bfloat16()
    wide = pymerge.della_linear(base.float(), [x.float()], seed=3)
    assert torch.equal(pymerge.della_linear(base, [x], seed=3), wide.bfloat16())


def test_pieces_do_not_show(monkeypatch):
    base, *models = torch.randn(4, 33, 7).unbind()
    for method in (pymerge.della, pymerge.della_linear):
        whole = method(base, models)
        with monkeypatch.context() as patch:
            patch.setattr(flat, "PIECE", 20)
            assert torch.equal(method(base, models), whole)


def test_errors():
    x = torch.ones(4)
    with pytest.raises(
        ValueError, match=r"density 0.1 and epsilon 0.15 of model 1 give probabilities from -0.05 to 0.25; choose an epsilon"
    ):
        pymerge.della(x, [x, x], density=[0.5, 0.1])
    with pytest.raises(ValueError, match="density 0.9 and epsilon 0.15 of model 0 give probabilities from 0.75 to 1.05"):
        pymerge.della_linear(x, [x], density=0.9)
    with pytest.raises(ValueError, match='della ranks within the rows of each tensor; pass a Convention of scope "tensor"'):
        pymerge.della(x, [x], convention=pymerge.Convention(scope="model"))
    with pytest.raises(ValueError, match='choose zero_vote "positive" or "drop"'):
        pymerge.della(x, [x], convention=pymerge.Convention(zero_vote="majority"))
    with pytest.raises(ValueError, match="density of model 0 is 1.5"):
        pymerge.della(x, [x], density=1.5)
