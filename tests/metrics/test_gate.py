"""The gate's statistics, beside scipy's and beside simulations, and its three outcomes."""

import json
import random

import pytest

pytest.importorskip("scipy")
from scipy import stats

from pymerge.metrics import RegressionGate
from pymerge.metrics.comparison import Comparison, compare_items, compare_means, holm


def items(n, accuracy, seed=0):
    rng = random.Random(seed)
    return [int(rng.random() < accuracy) for _ in range(n)]


def changed(scores, worse, better, seed=0):
    """The scores with so many right answers turned wrong and wrong ones right."""
    rng = random.Random(seed)
    scores = list(scores)
    right, wrong = ([i for i, s in enumerate(scores) if s == v] for v in (1, 0))
    for i in rng.sample(right, worse):
        scores[i] = 0
    for i in rng.sample(wrong, better):
        scores[i] = 1
    return scores


def test_at_no_difference_the_score_test_is_mcnemar_s():
    found = compare_items(items(500, 0.8), changed(items(500, 0.8), 30, 12))
    z = (12 - 30) / (12 + 30) ** 0.5
    assert found.p_inferior() == pytest.approx(stats.norm.cdf(z))
    assert found.difference == pytest.approx(-18 / 500)


def test_scores_that_are_not_right_or_wrong_take_the_t_test():
    rng = random.Random(1)
    old = [rng.random() for _ in range(40)]
    new = [x + rng.gauss(-0.05, 0.1) for x in old]
    expected = stats.ttest_rel(new, old, alternative="less")
    assert compare_items(old, new).p_inferior() == pytest.approx(expected.pvalue)
    low, high = compare_items(old, new).interval(0.9)
    assert (low, high) == pytest.approx(tuple(stats.ttest_rel(new, old).confidence_interval(0.9)))


def test_unpaired_is_the_z_test():
    found = compare_means(0.8, 0.01, 0.77, 0.012)
    assert found.p_inferior() == pytest.approx(stats.norm.cdf(-0.03 / (0.01**2 + 0.012**2) ** 0.5))
    assert found.p_not_inferior(0.05) == pytest.approx(stats.norm.sf(0.02 / (0.01**2 + 0.012**2) ** 0.5))


@pytest.mark.parametrize("n, worse, better", [(50, 3, 0), (200, 20, 18), (1319, 60, 40), (100, 0, 0), (30, 0, 30)])
def test_the_interval_is_what_the_tests_do_not_refuse(n, worse, better):
    found = Comparison((better - worse) / n, 0.01, float("inf"), "paired", n, (better, worse))
    low, high = found.interval(0.9)
    assert -1 <= low <= found.difference <= high <= 1
    assert low < -1 + 1e-9 or found.p_not_inferior(-low) == pytest.approx(0.05, abs=1e-4)
    assert high > 1 - 1e-9 or found.p_inferior(-high) == pytest.approx(0.05, abs=1e-4)


def test_a_model_that_lost_the_margin_passes_no_more_often_than_alpha():
    """Simulated: a true drop of exactly the margin, 400 items."""
    rng, passes, trials = random.Random(2), 0, 1000
    for _ in range(trials):
        worse = sum(rng.random() < 0.08 for _ in range(400))
        better = sum(rng.random() < 0.03 for _ in range(400 - worse))
        share = better / max(400 - worse, 1) * 400  # roughly 3 % of all
        better = round(share)
        passes += Comparison((better - worse) / 400, 0.0, float("inf"), "paired", 400, (better, worse)).p_not_inferior(0.05) < 0.05
    assert passes / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5 + 0.01


def test_three_outcomes():
    old = {name: items(2000, 0.8) for name in ("kept", "lost")} | {"few": items(60, 0.8)}
    new = {"kept": changed(old["kept"], 20, 18), "lost": changed(old["lost"], 120, 20), "few": changed(old["few"], 3, 2)}
    report = RegressionGate(margin=0.02).compare(old, new)
    assert {p.name: p.outcome for p in report.probes} == {"kept": "pass", "lost": "fail", "few": "inconclusive"}
    assert report.outcome == "fail" and report.exit_code == 1
    few = report.probes[2]
    assert few.detectable_drop > 0.02 and few.items_needed > 60
    assert "items would do, now 60" in few.sentence() and "it dropped" in report.probes[1].sentence()
    assert json.loads(report.to_json())["probes"][0]["outcome"] == "pass"
    assert "| lost |" in report.to_markdown()
    only = RegressionGate(margin=0.02).compare({"few": old["few"]}, {"few": new["few"]})
    assert only.outcome == "inconclusive" and only.exit_code == 3
    assert RegressionGate(margin=0.02, critical=["few"]).compare({"few": old["few"]}, {"few": new["few"]}).exit_code == 1


def test_a_certain_drop_within_the_margin_passes():
    old = items(20_000, 0.8)
    report = RegressionGate(margin=0.05).compare({"a": old}, {"a": changed(old, 400, 200)})
    assert report.probes[0].dropped and report.outcome == "pass"


def test_many_probes_are_corrected():
    old = items(400, 0.8)
    new = changed(old, 16, 6)  # p about 0.016
    one = RegressionGate(margin=0.001).compare({"a": old}, {"a": new})
    many = RegressionGate(margin=0.001).compare({str(i): old for i in range(20)}, {str(i): new for i in range(20)})
    assert one.outcome == "fail" and many.outcome == "inconclusive"
    assert (
        RegressionGate(margin=0.001, correction="none").compare({str(i): old for i in range(20)}, {str(i): new for i in range(20)}).outcome
        == "fail"
    )
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_repeated_runs_are_not_more_items():
    old, new = items(300, 0.8), changed(items(300, 0.8), 12, 10)
    once = compare_items([float(x) for x in old], [x + 1e-9 for x in new])
    thrice = compare_items([old] * 3, [[x + 1e-9 for x in new]] * 3)
    assert thrice.stderr == pytest.approx(once.stderr) and thrice.items == 300


def test_lower_is_better_and_the_noise_floor():
    gate = RegressionGate(margin=0.1, higher_is_better=False)
    better = gate.compare({"loss": (2.0, 0.01)}, {"loss": (1.5, 0.01)})
    worse = gate.compare({"loss": (2.0, 0.01)}, {"loss": (2.5, 0.01)})
    assert better.outcome == "pass" and worse.outcome == "fail"
    assert [p.name for p in better.suspicious] == ["loss"]
    assert worse.probes[0].difference == pytest.approx(-0.5)
    floored = RegressionGate(margin=0.1, noise_floor={"loss": 0.5}, higher_is_better=False).compare(
        {"loss": (2.0, 0.01)}, {"loss": (2.5, 0.01)}
    )
    assert floored.outcome == "pass"
    scores = items(50, 0.5)
    swapped = RegressionGate(margin=0.05, higher_is_better=False).compare({"a": scores}, {"a": changed(scores, 20, 0)})
    assert swapped.outcome == "pass"


@pytest.mark.parametrize("build, message", [
    (lambda: RegressionGate(margin=0), "must be positive"),
    (lambda: RegressionGate(alpha=0.7), "alpha"),
    (lambda: RegressionGate(correction="bh"), "correction"),
    (lambda: RegressionGate().compare({"a": [1]}, {"b": [1]}), "only old has"),
    (lambda: RegressionGate().compare({}, {}), "no probes"),
    (lambda: RegressionGate().compare({"a": [1, 0]}, {"a": [1]}), "'a': 2 old and 1 new"),
    (lambda: RegressionGate().compare({"a": [1, float("nan")]}, {"a": [1, 0]}), "item 1 is nan"),
    (lambda: RegressionGate().compare({"a": (0.5, 0.1)}, {"a": [1, 0]}), "one kind"),
    (lambda: RegressionGate().compare({"a": (0.5, float("nan"))}, {"a": (0.5, 0.1)}), "old_stderr"),
    (lambda: RegressionGate(critical=["b"]).compare({"a": [1]}, {"a": [1]}), "not measured"),
    (lambda: RegressionGate(margin={"b": 0.1}).compare({"a": [1]}, {"a": [1]}), "no margin for 'a'"),
])  # fmt: skip
def test_what_makes_no_sense_is_said(build, message):
    with pytest.raises(ValueError, match=message):
        build()
