"""greedy_soup: the order of trials, what is accepted, and how many models are in memory."""

import gc
import weakref

import pytest
import torch
from torch import nn

import pymerge
from pymerge import greedy_soup, model_soup


def candidates(*values):
    return [{"w": torch.tensor([float(v)])} for v in values]


def closeness_to(target):
    return lambda model: -abs(float(model["w"]) - target)


def test_recipe():
    """Target 5: 6 comes first; with 4 the mean is 5; adding 9 or -7 makes it worse."""
    result = greedy_soup(candidates(9, 4.0, -7, 6.0), closeness_to(5.1))
    assert result.scores == pytest.approx((-3.9, -1.1, -12.1, -0.9))
    assert result.chosen == (3, 1) and result.soup["w"].item() == 5.0 and result.score == pytest.approx(-0.1)


def test_lower_is_better():
    result = greedy_soup(candidates(9, 4, -7, 6), lambda m: abs(float(m["w"]) - 5.1), higher_is_better=False)
    assert result.chosen == (3, 1) and result.score == pytest.approx(0.1)


def test_equal_scores_are_accepted_unless_strict_and_tried_in_order():
    models, constant = candidates(1, 2, 3), lambda m: 0.5
    assert greedy_soup(models, constant).chosen == (0, 1, 2)
    assert greedy_soup(models, constant, strict=True).chosen == (0,)


def test_given_scores_save_the_first_round():
    trials = []

    def evaluate(model):
        trials.append(float(model["w"]))
        return closeness_to(5.1)(model)

    result = greedy_soup(candidates(9, 4, -7, 6), evaluate, scores=[0.2, 0.3, 0.1, 0.4])
    assert trials[0] == 5.0 and len(trials) == 3
    assert result.chosen[0] == 3 and result.scores == (0.2, 0.3, 0.1, 0.4)


def test_nan_scores_come_last_and_are_never_accepted():
    nan = float("nan")
    result = greedy_soup(candidates(1, 2, 3), lambda m: nan if float(m["w"]) != 2 else 1.0)
    assert result.chosen == (1, 0) or result.chosen == (1,)
    assert greedy_soup(candidates(1, 2, 3), lambda m: nan, scores=[nan, 1.0, nan]).chosen == (1,)
    with pytest.raises(ValueError, match="every candidate's score is NaN"):
        greedy_soup(candidates(1, 2), lambda m: nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_soup_has_the_bytes_of_model_soup(dtype):
    g = torch.Generator().manual_seed(0)
    models = [{"a": torch.randn(50, generator=g).to(dtype), "n": torch.tensor(3)} for _ in range(7)]
    result = greedy_soup(models, lambda m: 0.0)
    want = model_soup([models[i] for i in result.chosen])
    assert result.soup["a"].dtype == dtype and torch.equal(result.soup["a"], want["a"]) and result.soup["n"] == 3
    assert greedy_soup(models, lambda m: 0.0, dtype=torch.float32).soup["a"].dtype == torch.float32


def test_mixed_dtypes_promote_as_model_soup_does():
    models = [{"w": torch.ones(2, dtype=d)} for d in (torch.bfloat16, torch.float16)]
    assert greedy_soup(models, lambda m: 0.0).soup["w"].dtype == torch.float32
    kept = greedy_soup(models, lambda m: float(m["w"].dtype == torch.bfloat16))
    assert kept.chosen == (0,) and kept.soup["w"].dtype == torch.bfloat16


def test_modules_and_tensors():
    nets = [nn.Linear(2, 1) for _ in range(3)]
    result = greedy_soup(nets, lambda state: float(state["bias"]))
    assert list(result.soup) == ["weight", "bias"]
    assert greedy_soup([torch.zeros(2), torch.ones(2)], lambda t: float(t.sum())).chosen == (1,)


def test_ties():
    def tied(v):
        w = torch.full((3,), float(v))
        return {"a": w, "b": w}

    result = greedy_soup([tied(1), tied(3)], lambda m: 0.0)
    assert result.soup["a"] is result.soup["b"] and result.soup["a"].tolist() == [2.0] * 3
    untied = {"a": torch.zeros(3), "b": torch.ones(3)}
    result = greedy_soup([tied(1), untied], lambda m: 0.0)
    assert result.soup["a"].tolist() == [0.5] * 3 and result.soup["b"].tolist() == [1.0] * 3


def test_candidates_are_not_changed():
    models = candidates(1, 2, 3)
    greedy_soup(models, lambda m: 0.0)
    assert [m["w"].item() for m in models] == [1.0, 2.0, 3.0]


def test_loaders_are_called_at_most_twice_and_freed():
    alive, calls, most = weakref.WeakSet(), [], 0

    class Dict(dict):
        __hash__ = object.__hash__

    def loader(i):
        def load():
            nonlocal most
            calls.append(i)
            model = Dict(w=torch.full((10,), float(i)))
            alive.add(model)
            most = max(most, len(alive))
            return model

        return load

    result = greedy_soup([loader(i) for i in range(6)], lambda m: 0.0)
    gc.collect()
    assert result.chosen == tuple(range(6)) and sorted(calls) == sorted([*range(6)] * 2)
    assert most <= 2 and len(alive) == 0


def test_errors():
    with pytest.raises(ValueError, match="no candidates given; pass a list of at least one"):
        greedy_soup([], closeness_to(0))
    with pytest.raises(ValueError, match="1 scores for 2 candidates"):
        greedy_soup(candidates(1, 2), closeness_to(0), scores=[1.0])
    with pytest.raises(ValueError, match=r"candidate 1: 'w' is \(2,\), candidate 0 is \(1,\)"):
        greedy_soup([*candidates(1), {"w": torch.zeros(2)}], lambda m: 0.0)
    with pytest.raises(TypeError, match="candidate 1 is a tensor, candidate 0 is a mapping"):
        greedy_soup([*candidates(1), torch.zeros(1)], lambda m: 0.0)
    with pytest.raises(pymerge.NonFiniteError, match="candidate 1: 'w' has 1 non-finite value"):
        greedy_soup(candidates(1, float("inf")), lambda m: 0.0)
