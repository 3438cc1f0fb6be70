"""The benchmark suite: what it measures is verified, a wrong result has no speed, and its report is what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pymerge
from benchmarks.suite import __main__ as program
from benchmarks.suite import measure, pages, plan, table, verify
from benchmarks.suite.inputs import make_inputs
from benchmarks.suite.logits import LogitsCase
from benchmarks.suite.methods import DENSITY, METHODS
from benchmarks.suite.rivals import Rival, rivals_of
from pymerge import native, reference
from pymerge.spec import MergeSpec

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the suite measures memory the way Linux tells it")


@pytest.mark.parametrize(
    ("layout", "elements", "dtype", "models"),
    [("one", 4099, "bf16", 3), ("one", 4099, "mixed", 3), ("one", 1030, "fp64", 2), ("thousand", 30_000, "fp16", 2)],
)
@pytest.mark.parametrize("method", METHODS)
def test_verifies(method, layout, elements, dtype, models):
    if dtype == "mixed" and method == "ema":
        return  # fp32 over bf16 is the same case
    inputs = METHODS[method].prepared(make_inputs(layout, elements, dtype, models))
    assert "the oracle's" in verify.verify(method, inputs, DENSITY.get(method, 1.0))


@pytest.mark.parametrize("place", [5, verify.WHOLE + 4096])
def test_a_wrong_result_is_found(place, monkeypatch):
    """Where the oracle looks, and between: another instruction set finds that one."""
    original, isa = pymerge.linear, native.current_isa()

    def wrong(models, *, out):
        original(models, out=out)
        if native.current_isa() == isa:
            out[place] += 1

    monkeypatch.setattr(pymerge, "linear", wrong)
    inputs = make_inputs("one", verify.WHOLE + 200_000, "bf16", 2)
    with pytest.raises(verify.Wrong, match="linear.* differs in 1 of"):
        verify.verify("linear", inputs, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.0003, 0.2, 0.99, 1.0])
def test_selection_by_counting_is_the_oracles(dtype, density):
    g = torch.Generator().manual_seed(1)
    base = torch.randn(5000, generator=g).to(torch.bfloat16).to(dtype)
    models = [base + torch.randint(-3, 4, (5000,), generator=g), torch.randn(5000, generator=g).to(dtype)]
    spec = MergeSpec((1.0, 1.0), (density, density), "magnitude", True)
    counts = spec.counts(5000)[0]
    want = reference.select([base], [[x] for x in models], counts)
    assert torch.equal(verify.select_by_counting(base, models, spec), want)


def row_of(tmp_path, *cases, effort=None) -> list[dict]:
    group = plan.Group("main", cases, effort or measure.Effort(3, 0.01, 0.01))
    path = tmp_path / "rows"
    assert program.measure_group(group, path) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def stay_alive(monkeypatch):
    """The process of the tests is not to be the first that is ended when memory runs out."""
    monkeypatch.setattr(program, "_die_first", lambda: None)


def test_rows(tmp_path, stay_alive):
    rows = row_of(
        tmp_path,
        measure.Case("ties", "one", 20_000, "bf16", 3, 0.2, 1, ("naive",)),
        measure.Case("ema", "one", 20_000, "bf16", 3, 1.0, 2, ("naive", "averaged")),
        measure.Case("diagnose", "one", 20_000, "bf16", 2, 1.0, 1),
    )
    ties, ema, diagnose = rows
    assert (ties["bytes"], ema["bytes"], diagnose["bytes"]) == (5 * 2 * 20_000, (2 + 4 + 4) * 20_000, 3 * 2 * 20_000)
    assert (ties["threads"], ties["models"], ema["models"], ties["density"]) == (1, 3, 1, 0.2)
    for row in rows:
        assert row["rounds"] >= 3 and row["ms"] > 0 and row["copy_ms"] > 0 and row["verified"]
        assert row["to_copy"][1] <= row["to_copy"][0] <= row["to_copy"][2]
    naive = ties["rivals"][0]
    assert naive["kind"] == "naive" and naive["agrees"] > 0.95 and naive["speedup"][0] == pytest.approx(naive["ms"] / ties["ms"], rel=2)
    assert [r["kind"] for r in ema["rivals"]] == ["naive", "averaged"] and all(r["agrees"] == 1 for r in ema["rivals"])


def test_state_dict_beside_one_tensor(tmp_path, stay_alive):
    (row,) = row_of(tmp_path, measure.Case("linear", "thousand", 30_000, "bf16", 2, 1.0, 1))
    assert row["tensors"] == 1000 and [r["kind"] for r in row["rivals"]] == ["one tensor"]
    assert "thousand: 1000 tensors" in table.markdown([row]) and "x one tensor" in table.markdown([row])


def test_divergence(tmp_path, stay_alive):
    (row,) = row_of(tmp_path, LogitsCase("jsd", 4, 1000, 1, rivals=False))
    assert row["bytes"] == 3 * 2 * 4000 and "fp64" in row["verified"]


def test_a_wrong_result_has_no_speed(tmp_path, stay_alive, monkeypatch, capsys):
    monkeypatch.setattr(pymerge, "linear", lambda models, *, out: out.zero_())
    group = plan.Group("main", (measure.Case("linear", "one", 5000, "bf16", 2, 1.0, 1),))
    assert program.measure_group(group, tmp_path / "rows") == 1
    assert (tmp_path / "rows").read_text() == "" and "WRONG, so without a speed: linear" in capsys.readouterr().out


def test_a_wrong_rival_has_no_speed(monkeypatch):
    inputs = make_inputs("one", 5000, "bf16", 2)
    METHODS["linear"].run(inputs, 1.0)
    case = measure.Case("linear", "one", 5000, "bf16", 2, 1.0, 1)
    fine = Rival("fine", lambda: inputs.out.clone(), 1)
    wrong = Rival("wrong", lambda: inputs.out + 1, 1)
    broken = Rival("broken", lambda: 1 / 0, 1)
    large = Rival("large", lambda: pytest.fail("tried without the memory"), 10**12)
    monkeypatch.setattr(measure, "rivals_of", lambda *_: [wrong, broken, large, fine])
    (entry,) = measure._compared("naive", case, inputs, None, lambda line: None)
    assert entry["rival"] == "fine" and "run" in entry
    assert entry["others"]["wrong"].startswith("its result is another: 0.") and "ZeroDivisionError" in entry["others"]["broken"]
    assert "GB are free" in entry["others"]["large"]


@pytest.mark.parametrize("kind", ["naive", "peft"])
def test_rivals_give_the_same(kind):
    if kind == "peft":
        pytest.importorskip("peft")
    inputs = make_inputs("one", 50_000, "bf16", 3)
    for method in METHODS:
        given = METHODS[method].prepared(inputs)
        for rival in rivals_of(kind, method, given, 0.3):
            if method == "diagnose":
                continue
            if METHODS[method].updates:
                given.out.copy_(inputs.base)
            got = rival.run()
            if METHODS[method].updates:
                given.out.copy_(inputs.base)
            METHODS[method].run(given, 0.3)
            agrees = verify.agreement(got, given.out)
            assert rival.random or agrees >= rival.least, (rival.label, method, agrees)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "mergekit"])
def test_slow_rivals_give_the_same(kind):
    if kind == "mergekit":
        pytest.importorskip("mergekit")
    test_rivals_give_the_same(kind)


@pytest.mark.slow
def test_the_whole_program(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.suite", "--quick", "--only", "size 1M", "threads", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {row["group"] for row in result["rows"]} == {"size 1M", "threads"} and result["bandwidth"] and not result["failures"]


def test_plans_are_whole():
    """Each group's cases share their tensors; the names that `--only` takes are different."""
    for chosen in (plan.full(), plan.quick()):
        names = [group.name for group in chosen.groups]
        assert len(set(names)) == len(names)
        for group in chosen.groups:
            shared = {(c.rows, c.vocabulary) if isinstance(c, LogitsCase) else (c.layout, c.elements, c.dtype) for c in group.cases}
            assert len(shared) == 1, group.name
    assert {case.method for case in plan.full().groups[0].cases} == set(METHODS)


@pytest.mark.parametrize("name", pages.BLOCKS)
def test_pages_say_what_was_measured(name):
    """Tables are generated: edit neither, run `make readme-table`."""
    assert pages.block(name) == pages.rendered(name, pages.source(name))


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.suite.plots import draw

    result = json.loads(pages.source("README").read_text())
    first, second = draw(result, tmp_path / "a"), draw(result, tmp_path / "b")
    assert "roofline.svg" in [path.name for path in first]
    for a, b in zip(first, second):
        assert a.read_bytes() == b.read_bytes() and "<svg" in a.read_text()
