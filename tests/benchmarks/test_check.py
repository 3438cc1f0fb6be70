"""The regression check: what it calls slow, and that a slow kernel is found."""

import json
import time

import pytest
import torch

from benchmarks.check import instructions, ratios
from benchmarks.check.kernels import KERNELS, Kernel, Tensors
from pymerge import native


@pytest.mark.parametrize(
    ("expected", "ratio", "said"),
    [(None, 3.0, "new"), (1.0, 1.0, "as expected"), (1.0, 1.4, "as expected"), (1.0, 1.45, "slow"), (10.0, 6.9, "fast")],
)
def test_judge(expected, ratio, said):
    """A drop of 30 % in speed is a ratio 1 / 0.7 times as large."""
    assert ratios.judge(expected, ratio) == said


def test_a_bad_moment_is_forgiven(monkeypatch):
    monkeypatch.setattr(ratios, "PAUSE", 0)
    moments = iter([(300.0, 100.0), (250.0, 110.0), (105.0, 120.0)])
    assert ratios.compare(1.0, lambda: next(moments)) == (1.05, 100.0, "as expected")
    always = [0]

    def slow():
        always[0] += 1
        return 200.0, 100.0

    assert ratios.compare(1.0, slow) == (2.0, 100.0, "slow") and always[0] == 1 + ratios.AGAIN


def test_fastest_counts_work_and_not_waiting():
    def work():
        end = time.thread_time() + 2e-3
        while time.thread_time() < end:
            pass

    def wait():
        work()
        time.sleep(0.01)

    working, waiting = ratios.fastest(work, wait, 0.05)
    assert waiting < 3 * working


def test_a_slow_kernel_is_found(monkeypatch, tmp_path, capsys):
    """Twice the work is slow; the machine's own numbers come from --update."""
    once = KERNELS["task_arithmetic"]
    monkeypatch.setattr(ratios, "KERNELS", {"task_arithmetic": once})
    monkeypatch.setattr(ratios, "LARGE", 2**18)
    monkeypatch.setattr(ratios, "SECONDS", {ratios.SMALL: 0.02, 2**18: 0.02})
    monkeypatch.setattr(ratios, "PAUSE", 0)
    monkeypatch.setattr(ratios, "EXPECTED", tmp_path / "expected.json")
    assert ratios.main([]) == 0 and "SKIPPED, none are committed for this CPU" in capsys.readouterr().out
    assert ratios.main(["--update"]) == 0
    assert set(json.loads((tmp_path / "expected.json").read_text())[ratios.cpu()]) == set(native.available_isas())

    def four_times(tensors):
        for _ in range(4):
            once.run(tensors)

    monkeypatch.setattr(ratios, "KERNELS", {"task_arithmetic": Kernel(four_times, once.bytes)})
    assert ratios.main([]) == 1 and "SLOW" in capsys.readouterr().out


def test_kernels_run():
    """Each is the backend's call and changes what it should."""
    tensors = Tensors(4096)
    for name in ("linear", "ties", "wise_ft"):
        tensors.out.fill_(torch.nan)
        KERNELS[name].run(tensors)
        assert tensors.out.isfinite().all(), name


def test_without_valgrind(monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.main([]) == 0 and "SKIPPED, valgrind is not installed" in capsys.readouterr().out
    assert instructions.main(["--update"]) == 1


@pytest.mark.slow
def test_grown_kernels_are_found(monkeypatch, tmp_path, capsys):
    if why := instructions.problem():
        pytest.skip(why)
    once = KERNELS["linear"]
    monkeypatch.setattr(instructions, "EXPECTED", tmp_path / "expected.json")
    monkeypatch.setattr(instructions, "KERNELS", {"linear": once})
    assert instructions.main(["--update"]) == 0 and instructions.main([]) == 0
    counts = json.loads((tmp_path / "expected.json").read_text())[instructions.compiler()]
    assert all(1 < kernels["linear"] < 500 for kernels in counts.values())
    for kernels in counts.values():
        kernels["linear"] *= 0.8
    (tmp_path / "expected.json").write_text(json.dumps({instructions.compiler(): counts}))
    assert instructions.main([]) == 1 and "GROWN" in capsys.readouterr().out
