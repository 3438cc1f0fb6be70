import pytest
import torch

import pymerge
from pymerge.pipeline import wise_ft_search

BASE, TUNED = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}


def evaluate(model):
    """Old tasks fall slowly at first, the new one rises and saturates."""
    a = model["w"].item()
    return 1 - a**2, min(2 * a, 1.0)


def test_the_best_on_the_new_task_that_keeps_the_old():
    found = wise_ft_search(BASE, TUNED, evaluate, max_drop=0.1)
    assert found.alpha == pytest.approx(0.3) and found.allowed == pytest.approx(0.9)
    assert torch.equal(found.model["w"], pymerge.wise_ft(BASE, TUNED, alpha=0.3)["w"])
    assert len(found.scores) == 11 and found.front[0] == 0.5 and found.front[-1] == 0.0
    # From 0.5 on the new task is saturated: of equal ones the one that keeps more.
    assert wise_ft_search(BASE, TUNED, evaluate, max_drop=1.0).alpha == 0.5


def test_no_drop_allowed_is_the_base():
    assert wise_ft_search(BASE, TUNED, evaluate).alpha == 0.0


def test_own_alphas_and_an_absolute_bound():
    found = wise_ft_search(BASE, TUNED, evaluate, alphas=[0.25, 0.4], min_old=0.9)
    assert sorted(found.scores) == [0.0, 0.25, 0.4] and found.alpha == 0.25
    with pytest.raises(ValueError, match="the most that is reached is 1"):
        wise_ft_search(BASE, TUNED, evaluate, min_old=1.1)


@pytest.mark.parametrize("change, message", [
    ({"alphas": 1}, "both ends"), ({"alphas": [1.5]}, "from 0 to 1"), ({"max_drop": -0.1}, "max_drop"),
    ({"evaluate": lambda m: (float("nan"), 0.0)}, "nan"),
])  # fmt: skip
def test_what_makes_no_sense_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        wise_ft_search(**{"base": BASE, "tuned": TUNED, "evaluate": evaluate, **change})
