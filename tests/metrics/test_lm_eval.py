"""Folders as lm-evaluation-harness writes them."""

import json

import pytest
from click.testing import CliRunner

from pymerge.cli.report import command
from pymerge.metrics import IncomparableRunsError, RegressionGate, backward_transfer, load_lm_eval
from pymerge.metrics.lm_eval import matrix_of, probes_of


def write(folder, accuracy, *, shots=5, version=1.0, limit=None, perplexity=12.0, samples=None, date="2026-08-01T10-00-00.000000", n=1000):
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "results": {
            "arc": {"name": "arc", "alias": "arc", "sample_len": n, "acc,none": accuracy, "acc_stderr,none": 0.01, "acc_norm,none": 0.5,
                    "acc_norm_stderr,none": 0.01},
            "wiki": {"alias": "wiki", "word_perplexity,none": perplexity, "word_perplexity_stderr,none": "N/A"},
            "both": {"alias": "both", "acc,none": 0.3, "acc_stderr,none": 0.1},
        },
        "groups": {"both": {"acc,none": 0.3}},
        "group_subtasks": {"both": ["arc"], "arc": []},
        "versions": {"arc": version, "wiki": 2.0},
        "n-shot": {"arc": shots, "wiki": 0},
        "higher_is_better": {"arc": {"acc": True, "acc_norm": True}, "wiki": {"word_perplexity": False}},
        "n-samples": {"arc": {"original": n, "effective": n}},
        "config": {"model": "hf", "model_args": f"pretrained={folder.name}", "limit": limit},
        "task_hashes": {"arc": "abc"},
    }  # fmt: skip
    (folder / f"results_{date}.json").write_text(json.dumps(data))
    if samples is not None:
        rows = [{"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "acc": s, "acc_norm": s} for i, s in enumerate(samples)]
        (folder / f"samples_arc_{date}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_scores_and_what_they_depend_on(tmp_path):
    run = load_lm_eval(write(tmp_path / "m", 0.8))
    assert run.model == "pretrained=m" and set(run.scores) == {
        ("arc", "acc", "none"), ("arc", "acc_norm", "none"), ("wiki", "word_perplexity", "none")
    }  # fmt: skip
    arc = run.scores["arc", "acc", "none"]
    assert (arc.value, arc.stderr, arc.version, arc.shots, arc.items, arc.higher_is_better) == (0.8, 0.01, 1.0, 5, 1000, True)
    assert not run.scores["wiki", "word_perplexity", "none"].higher_is_better


def test_the_newest_file_of_a_folder(tmp_path):
    write(tmp_path / "m", 0.1, date="2026-08-01T10-00-00.000000")
    write(tmp_path / "m" / "deeper", 0.9, date="2026-08-02T10-00-00.000000")
    assert load_lm_eval(tmp_path / "m").scores["arc", "acc", "none"].value == 0.9


@pytest.mark.parametrize("change, message", [
    ({"shots": 0}, "number of shots is 5 and 0"),
    ({"version": 2.0}, "version is 1.0 and 2.0"),
    ({"limit": 100}, "limit is None and 100"),
    ({"n": 500}, "number of items is 1000 and 500"),
])  # fmt: skip
def test_runs_that_measured_something_else_are_refused(tmp_path, change, message):
    a, b = load_lm_eval(write(tmp_path / "a", 0.8)), load_lm_eval(write(tmp_path / "b", 0.8, **change))
    for compare in (lambda: probes_of(a, b), lambda: matrix_of({"a": a, "b": b})):
        with pytest.raises(IncomparableRunsError, match=message):
            compare()


def test_items_are_paired_where_samples_were_logged(tmp_path):
    scores = [1] * 800 + [0] * 200
    dropped = [0] * 60 + scores[60:]
    a, b = (load_lm_eval(write(tmp_path / name, sum(s) / 1000, samples=s)) for name, s in (("a", scores), ("b", dropped)))
    probes = probes_of(a, b)
    assert probes.unjudged == ("wiki",)
    report = RegressionGate(0.02, higher_is_better=probes.higher_is_better).compare(probes.old, probes.new)
    assert report.probes[0].method == "paired" and report.outcome == "fail"
    assert probes_of(load_lm_eval(write(tmp_path / "c", 0.8)), b, tasks=["arc"]).old["arc"] == (0.8, 0.01, 1000)
    c = load_lm_eval(write(tmp_path / "d", 0.8, samples=scores[:-1] + [0, 1]))
    with pytest.raises(IncomparableRunsError, match="not of the same documents"):
        probes_of(a, c, tasks=["arc"])


def test_a_matrix_of_stages(tmp_path):
    runs = {name: load_lm_eval(write(tmp_path / name, acc, perplexity=ppl)) for name, acc, ppl in (("base", 0.5, 10), ("sft", 0.45, 12))}
    m = matrix_of(runs)
    assert backward_transfer(m.only(["arc"])).value == pytest.approx(-0.05)
    assert backward_transfer(m.only(["wiki"])).value == pytest.approx(-2)


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"results": {}}'])
def test_other_files_are_named(tmp_path, text):
    (tmp_path / "results_x.json").write_text(text)
    with pytest.raises(ValueError, match="results_x.json"):
        load_lm_eval(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no results"):
        load_lm_eval(tmp_path / "empty")


def test_the_command(tmp_path):
    scores = [1] * 800 + [0] * 200
    write(tmp_path / "base", 0.8, samples=scores)
    write(tmp_path / "sft", 0.74, samples=[0] * 60 + scores[60:])
    folders = [str(tmp_path / "base"), str(tmp_path / "sft")]
    run = CliRunner().invoke(command, [*folders, "--margin", "0.02", "--plot", str(tmp_path / "p.png")], standalone_mode=False)
    assert run.exception is None and run.return_value == 1, run.output
    assert "wiki: has no standard error" in run.stderr
    assert "| sft | 0.74 (-0.06)" in run.output and "it dropped" in run.output and (tmp_path / "p.png").stat().st_size > 5000
    as_json = CliRunner().invoke(command, [*folders, "--json"], standalone_mode=False)
    assert as_json.return_value == 0 and json.loads(as_json.output)["matrix"]["stages"] == ["base", "sft"]
    alone = CliRunner().invoke(command, [str(tmp_path / "base"), "--margin", "0.1"])
    assert alone.exit_code == 2 and "old one first" in alone.output
