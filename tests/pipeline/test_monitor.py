"""Rounds of stages over several processes, and what becomes of a line that was torn by a kill."""

import json

import pytest

from pymerge.metrics import RegressionGate, backward_transfer
from pymerge.pipeline import StageMonitor

pytest.importorskip("scipy")


def scores(right, of=400):
    return [1] * right + [0] * (of - right)


def probes():
    """A model is a mapping of probe -> number of right answers."""
    return {name: (lambda model, name=name: scores(model[name])) for name in ("old", "format")}


def monitor(path):
    return StageMonitor(path, probes(), RegressionGate(margin=0.03), introduced={"format": "sft"})


def test_a_run_over_two_processes(tmp_path):
    path = tmp_path / "run" / "stages.jsonl"
    first = monitor(path)
    assert first.record("base", {"old": 300, "format": 20}) is None
    assert first.record("sft", {"old": 298, "format": 396}, notes={"lr": 1e-5}).outcome == "pass"
    before = path.read_text()
    second = monitor(path)
    assert second.names == ["base", "sft"]
    report = second.record("rl", {"old": 296, "format": 300})
    assert report.outcome == "fail" and [p.name for p in report.probes if p.outcome == "fail"] == ["format"]
    assert path.read_text().startswith(before)  # it only grows
    assert backward_transfer(second.matrix()).parts == pytest.approx({"old": -0.01, "format": -0.24})
    text = second.report()
    assert "rl: fail against 'sft', pass against 'base'" in text and "format 0.99 -> 0.75, fail" in text and "wise_ft_search" in text
    assert json.loads(path.read_text().splitlines()[1])["notes"] == {"lr": 1e-5}


def test_a_torn_line_is_cut_off_and_nothing_else_is_lost(tmp_path):
    path = tmp_path / "s.jsonl"
    monitor(path).record("base", {"old": 300, "format": 20})
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="incomplete"):
        again = monitor(path)
    assert again.names == ["base"] and path.read_text() == whole
    again.record("sft", {"old": 300, "format": 300})
    assert monitor(path).names == ["base", "sft"]


def test_scores_measured_elsewhere(tmp_path):
    m = StageMonitor(tmp_path / "s.jsonl")
    m.record("base", scores={"loss": [2.0, 1.5]})
    assert m.record("sft", scores={"loss": [1.0, 1.5]}) is None
    assert m.matrix().score("sft", "loss") == 1.25
    assert "not compared" in m.report()


@pytest.mark.parametrize("stage, given, message", [
    ("base", {"old": [1.0]}, "recorded already"),
    ("sft", {"old": [1.0, 0.0, 1.0]}, "3 items, the first stage 2"),
    ("sft", {"new": [1.0, 0.0]}, r"has the probes \['old'\]"),
    ("sft", {"old": [1.0, float("nan")]}, "item 1 is nan"),
    ("sft", {"old": []}, "no scores"),
    ("sft", {}, "there are no probes"),
])  # fmt: skip
def test_what_does_not_fit_is_said_and_not_written(tmp_path, stage, given, message):
    m = StageMonitor(tmp_path / "s.jsonl")
    m.record("base", scores={"old": [1.0, 0.0]})
    with pytest.raises(ValueError, match=message):
        m.record(stage, scores=given)
    assert StageMonitor(tmp_path / "s.jsonl").names == ["base"]


def test_another_file_is_refused_by_line(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"version": 1, "stage": "base", "items": {}}\nnot json\n')
    with pytest.raises(ValueError, match="s.jsonl:2"):
        StageMonitor(tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match="nothing was recorded"):
        StageMonitor(tmp_path / "none.jsonl").matrix()
