"""Every number by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pymerge
from pymerge.metrics import (
    MissingScoreError,
    ResultMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
    normalized_improvement,
    retention,
    worst_case_accuracy,
)

# Base, then three stages that train a, b, c.
ROWS = [
    [0.10, 0.20, 0.30],
    [0.90, 0.25, 0.20],
    [0.70, 0.80, 0.45],
    [0.80, 0.60, 0.95],
]
R = ResultMatrix(["base", "A", "B", "C"], ["a", "b", "c"], ROWS)


@pytest.mark.parametrize("metric, value, parts", [
    (average_accuracy(R), (0.80 + 0.60 + 0.95) / 3, {"a": 0.80, "b": 0.60, "c": 0.95}),
    (average_incremental_accuracy(R), (0.90 + (0.70 + 0.80) / 2 + (0.80 + 0.60 + 0.95) / 3) / 3, {"A": 0.9, "B": 0.75, "C": 2.35 / 3}),
    (learning_accuracy(R), (0.90 + 0.80 + 0.95) / 3, {"a": 0.90, "b": 0.80, "c": 0.95}),
    (backward_transfer(R), (-0.10 - 0.20) / 2, {"a": -0.10, "b": -0.20}),
    (backward_transfer(R, variant="diaz"), (-0.20 - 0.10 - 0.20) / 3, {("B", "a"): -0.20, ("C", "a"): -0.10, ("C", "b"): -0.20}),
    (forward_transfer(R), (0.25 - 0.20 + 0.45 - 0.30) / 2, {"b": 0.05, "c": 0.15}),
    (forward_transfer(R, [0, 0.1, 0.2]), (0.15 + 0.25) / 2, {"b": 0.15, "c": 0.25}),
    (forward_transfer(R, variant="diaz"), (0.25 + 0.20 + 0.45) / 3, {("A", "b"): 0.25, ("A", "c"): 0.20, ("B", "c"): 0.45}),
    (forgetting(R), (0.10 + 0.20) / 2, {"a": 0.10, "b": 0.20}),
    (forgetting(R, stage="B"), 0.20, {"a": 0.20}),
    (intransigence(R, {"a": 0.95, "c": 0.9}), (0.05 - 0.05) / 2, {"a": 0.05, "c": -0.05}),
    (retention(R), (0.8 / 0.9 + 0.6 / 0.8 + 1) / 3, {"a": 0.8 / 0.9, "b": 0.75, "c": 1.0}),
    (retention(R, chance={"a": 0.1}), (0.7 / 0.8 + 0.75 + 1) / 3, {"a": 0.875, "b": 0.75, "c": 1.0}),
    (retention(R, reference="base"), (8 + 3 + 0.95 / 0.3) / 3, {"a": 8.0, "b": 3.0, "c": 0.95 / 0.3}),
    (worst_case_accuracy(R), (0.70 + 0.60 + 0.95) / 3, {"a": 0.70, "b": 0.60, "c": 0.95}),
    (normalized_improvement({"a": 0.6, "b": 0.5}, {"a": 0.2, "b": 0.1}, {"a": 0.7, "b": 0.9}), (0.8 + 0.5) / 2, {"a": 0.8, "b": 0.5}),
])  # fmt: skip
def test_by_hand(metric, value, parts):
    assert float(metric) == pytest.approx(value)
    assert metric.parts == pytest.approx(parts)


def test_rows_of_numbers_are_a_matrix():
    assert pymerge.backward_transfer([[0.9, 0.1], [0.5, 0.8]]).value == pytest.approx(-0.4)
    assert pymerge.forward_transfer([[0.9, 0.1], [0.5, 0.8]], [0.0, 0.3]).value == pytest.approx(-0.2)


def test_chaudhry_takes_the_best_earlier_stage_and_lopez_paz_the_first():
    rows = [[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.6, 0.5, 0.5]]
    assert forgetting(rows).parts["task 1"] == pytest.approx(0.3)
    assert backward_transfer(rows).parts["task 1"] == pytest.approx(0.1)


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)))
def test_forgetting_is_at_least_minus_bwt(rows):
    assert float(forgetting(rows)) >= -float(backward_transfer(rows)) - 1e-12


def test_lower_is_better_is_turned_around():
    losses = [[2.0, 3.0], [1.0, 2.5], [1.5, 0.5]]
    m = ResultMatrix(["base", "A", "B"], ["a", "b"], losses, higher_is_better=False)
    assert float(backward_transfer(m)) == pytest.approx(-0.5)  # the loss on a rose
    assert float(forward_transfer(m)) == pytest.approx(0.5)
    assert float(forgetting(m)) == pytest.approx(0.5)
    assert float(average_accuracy(m)) == pytest.approx(1.0)  # as measured
    assert float(worst_case_accuracy(m)) == pytest.approx(1.0)
    assert float(retention(m)) == pytest.approx((1.0 / 1.5 + 1) / 2)
    with pytest.raises(ValueError, match="no chance level"):
        retention(m, chance=0.1)


def test_units_are_not_mixed():
    m = ResultMatrix(["base", "A"], ["acc", "ppl"], [[0.5, 20], [0.6, 18]], introduced={}, higher_is_better={"acc": True, "ppl": False})
    with pytest.raises(ValueError, match="different units"):
        average_accuracy(m)
    assert float(average_accuracy(m.only(["ppl"]))) == 18


def test_a_missing_score_is_never_zero():
    m = ResultMatrix(["A", "B", "C"], ["a", "b", "c"], {"A": {"a": 0.9}, "B": {"a": 0.8, "b": 0.7}, "C": {"b": 0.6, "c": 0.5}})
    assert m.missing == [("A", "b"), ("A", "c"), ("B", "c"), ("C", "a")]
    with pytest.raises(MissingScoreError, match="BWT.*for a;"):
        backward_transfer(m)
    skipped = backward_transfer(m, missing="skip")
    assert skipped.parts == pytest.approx({"b": -0.1}) and skipped.skipped == ("a",)
    with pytest.raises(MissingScoreError):
        forward_transfer(m)
    assert math.isnan(backward_transfer([[0.5]]).value)  # one task: nothing to forget, not 0


def test_a_stage_may_introduce_several_tasks_and_probes_belong_to_the_base():
    rows = {"base": {"old": 0.6, "x": 0.1, "y": 0.1}, "sft": {"old": 0.5, "x": 0.8, "y": 0.7}, "rl": {"old": 0.4, "x": 0.6, "y": 0.9}}
    m = ResultMatrix(list(rows), ["old", "x", "y"], rows, introduced={"x": "sft", "y": "sft"})
    assert backward_transfer(m).parts == pytest.approx({"old": -0.2, "x": -0.2, "y": 0.2})
    assert forgetting(m).parts == pytest.approx({"old": 0.2, "x": 0.2, "y": -0.2})


@pytest.mark.parametrize("build, message", [
    (lambda: ResultMatrix(["a"], ["x"], [[1, 2]]), "rows of"),
    (lambda: ResultMatrix(["a", "a"], ["x"], [[1], [2]]), "twice"),
    (lambda: ResultMatrix(["a"], ["x"], {"b": {"x": 1}}), "unknown 'b'"),
    (lambda: ResultMatrix(["a", "b", "c"], ["x"], [[1], [2], [3]]), "say which stage"),
    (lambda: ResultMatrix(["a"], ["x"], [[1]], introduced={"x": "z"}), "unknown 'z'"),
    (lambda: ResultMatrix(["a"], ["x", "y"], [[1, 2]], introduced={}, units={"x": "u"}), "units"),
    (lambda: backward_transfer(R, variant="avalanche"), "variant"),
    (lambda: backward_transfer(R, missing="zero"), "missing"),
    (lambda: retention(R, chance=0.8), "chance level"),
    (lambda: normalized_improvement({"a": 1}, {"a": 1}, {"a": 1}), "changed nothing"),
    (lambda: forward_transfer(R, [1.0]), "1 numbers for 3"),
])  # fmt: skip
def test_what_makes_no_sense_is_said(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_saved_and_loaded(tmp_path):
    m = ResultMatrix(
        ["A", "B"], ["a", "b"], {"A": {"a": 0.9}, "B": {"a": 0.8, "b": 0.7}}, units="accuracy", stderr=[[0.1, None], [0.1, 0.2]]
    )
    m.save(tmp_path / "r.json")
    again = ResultMatrix.load(tmp_path / "r.json")
    assert again.to_dict() == m.to_dict() and again.stderr("B", "b") == 0.2
    (tmp_path / "bad.json").write_text('{"stages": 1}')
    with pytest.raises(ValueError, match="bad.json: not a result matrix"):
        ResultMatrix.load(tmp_path / "bad.json")
