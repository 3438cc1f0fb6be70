"""task_arithmetic, linear, model_soup and wise_ft against their formulas."""

import numpy as np
import pytest
import torch

import pymerge
from tests.oracles import averages

T0 = {"w": torch.zeros(3)}
A, B = {"w": torch.tensor([1.0, 0.0, 0.0])}, {"w": torch.tensor([0.0, 2.0, 0.0])}


@pytest.fixture(autouse=True)
def _(each_backend):
    pass


def normal(count, n=1000, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=n).astype(np.float32) for _ in range(count)]


def tensors(arrays):
    return [torch.from_numpy(x) for x in arrays]


def test_the_toy_results_of_the_source_document():
    assert pymerge.model_soup([A, B])["w"].tolist() == [0.5, 1.0, 0.0]
    assert pymerge.task_arithmetic(T0, [A, B], [1.0, 1.0])["w"].tolist() == [1.0, 2.0, 0.0]
    assert pymerge.task_arithmetic(T0, [A, B], [1.0, -1.0])["w"].tolist() == [1.0, -2.0, 0.0]
    assert pymerge.task_arithmetic(T0, [A, B], 0.5)["w"].tolist() == [0.5, 1.0, 0.0]
    assert pymerge.task_arithmetic(T0, [A, B])["w"].tolist() == [1.0, 2.0, 0.0]
    assert not T0["w"].any()


def test_task_arithmetic():
    base, *models = normal(4)
    got = pymerge.task_arithmetic(torch.from_numpy(base), tensors(models), [0.4, -1.5, 2.0])
    np.testing.assert_allclose(got.numpy(), averages.task_arithmetic(base, models, [0.4, -1.5, 2.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [None, 2.0, (0.2, 0.3, 0.5), (1.0, -0.5, 3.0)])
def test_linear(weights, normalize):
    models = normal(3)
    full = {None: (1.0,) * 3, 2.0: (2.0,) * 3}.get(weights, weights)
    got = pymerge.linear(tensors(models), weights=weights, normalize=normalize)
    np.testing.assert_allclose(got.numpy(), averages.linear(models, full, normalize), rtol=1e-6, atol=1e-6)
    if normalize:
        assert torch.equal(pymerge.model_soup(tensors(models), weights), got)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [0.1 + 0.2, -0.3]])
def test_weights_that_cancel_cannot_be_normalised(weights):
    t = torch.ones(2)
    with pytest.raises(ValueError, match="sum to zero, so they cannot be normalised; pass normalize=False or other weights"):
        pymerge.linear([t, t], weights=weights)
    pymerge.linear([t, t], weights=weights, normalize=False)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0, 1.7, -0.3])
def test_wise_ft(alpha):
    base, finetuned = normal(2)
    got = pymerge.wise_ft(*tensors((base, finetuned)), alpha=alpha)
    np.testing.assert_allclose(got.numpy(), averages.wise_ft(base, finetuned, np.float32(alpha)), rtol=1e-6, atol=2e-6)


def test_wise_ft_is_exact_at_the_ends_and_where_both_agree():
    base, finetuned = tensors(normal(2))
    assert torch.equal(pymerge.wise_ft(base, finetuned, alpha=0.0), base)
    assert torch.equal(pymerge.wise_ft(base, finetuned, alpha=1.0), finetuned)
    assert torch.equal(pymerge.wise_ft(base, base, alpha=0.37), base)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_coefficients_must_be_finite(bad):
    t = torch.ones(2)
    with pytest.raises(ValueError, match=f"alpha is {bad}; it must be finite"):
        pymerge.wise_ft(t, t, alpha=bad)
    with pytest.raises(ValueError, match=f"t is {bad}; it must be finite"):
        pymerge.slerp(t, t, t=bad)
