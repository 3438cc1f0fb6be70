"""What `pymerge bench` and the benchmarks measure with."""

import sys

import pytest
import torch

from pymerge.speed import ceiling, rounds
from pymerge.speed.memory import extra_bytes
from pymerge.speed.rounds import Contender, Times, interleave, ratio
from pymerge.speed.weights import Weights


def test_interleaving():
    order = []
    times = interleave({name: Contender(lambda n=name: order.append(n), 10) for name in "ab"}, 3)
    assert "".join(order) == "aabb" * 3, "each once untimed, then timed, in turn"
    assert [len(t.ms) for t in times.values()] == [3, 3]
    assert len(interleave({"a": Contender(lambda: None, 10)}, 100, enough=lambda t: len(t["a"].ms) == 7)["a"].ms) == 7


def test_slow_programs_run_once(monkeypatch):
    """Not warmed up, not again when the time is over, and not at all when the run before took too long already."""
    runs = []
    monkeypatch.setattr(rounds, "elapsed_ms", lambda run: run() or 400.0)
    times = interleave(
        {"slow": Contender(lambda: runs.append(1), 0.1, last_ms=90.0), "known": Contender(pytest.fail, 0.1, last_ms=900.0)}, 5
    )
    assert times["slow"].ms == [400.0] and len(runs) == 2 and times["known"].ms == [900.0]


def test_ratio():
    assert ratio(Times([2.0, 4.0, 9.0]), Times([1.0, 2.0, 3.0])) == (2.0, 2.0, 2.5), "round by round"
    assert ratio(Times([10.0]), Times([1.0, 2.0, 4.0])) == (5.0, pytest.approx(10 / 3), pytest.approx(10 / 1.5))
    assert Times([3.0]).quartiles == (3.0, 3.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_memory_at_the_peak():
    """An array that is made and thrown away shows, one that was there before does not."""
    there = torch.ones(2**22)
    extra = extra_bytes(lambda: torch.ones(2**24).sum())
    if extra is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 0.9 * 2**26 < extra < 1.5 * 2**26
    assert extra_bytes(lambda: there.add_(1)) < 2**22


def test_a_large_copy_is_scaled(monkeypatch):
    monkeypatch.setattr(ceiling, "LARGEST", 48 * 1000)
    c = ceiling.Ceiling(480 * 1000)
    c.round()
    c.close()
    assert c.scale == 10 and c.milliseconds()[1] == pytest.approx(10 * min(torch.tensor(t).median().item() for t in c._times.values()))


def test_weights(monkeypatch):
    from pymerge.speed import weights

    monkeypatch.setattr(weights, "_CHUNK", 1000)
    w = Weights.random(4500, torch.bfloat16, model_dtypes=[torch.float16, torch.float32])
    assert [x.dtype for x in (w.base, *w.models, w.out)] == [torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]
    assert all(0.019 < part.std().item() < 0.021 for part in w.base.float().split(1500)), "every chunk is filled"
    assert 0.0018 < (w.models[1] - w.base.float()).std().item() < 0.0022
