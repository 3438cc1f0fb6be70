import pytest
import torch

import pymerge
from pymerge.pipeline import SequentialMerger


def models(count=3):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(40, generator=generator), "b": torch.randn(3, generator=generator)}
    stages = [{k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(count)]
    return base, stages


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_averages_by_hand():
    base = {"w": torch.tensor([0.0])}
    ema = SequentialMerger(base, "ema", decay=0.75)
    assert [ema.add({"w": torch.tensor([x])})["w"].item() for x in (4.0, 8.0)] == [1.0, 2.75]
    wise = SequentialMerger(base, "wise_ft", alpha=[0.5, 0.25])
    assert [wise.add({"w": torch.tensor([x])})["w"].item() for x in (4.0, 10.0)] == [2.0, 4.0]
    with pytest.raises(ValueError, match="this is stage 3"):
        wise.add(base)
    assert wise.names == ["stage 1", "stage 2"]


@pytest.mark.parametrize("method, settings, whole", [
    ("task_arithmetic", {"scale": 0.4}, lambda b, m: pymerge.task_arithmetic(b, m, [0.4] * len(m))),
    ("ties", {"density": 0.3}, lambda b, m: pymerge.ties(b, m, density=0.3)),
    ("magmax", {}, lambda b, m: pymerge.magmax(b, m)),
])  # fmt: skip
def test_methods_from_the_base_are_the_merge_of_all_stages_so_far(method, settings, whole):
    base, stages = models()
    merger = SequentialMerger(base, method, **settings)
    for i, stage in enumerate(stages, 1):
        assert same(merger.add(stage), whole(base, stages[:i]))
    assert same(merger.merged, whole(base, stages))


def test_what_the_next_stage_starts_from():
    base, stages = models()
    for init, want in (("base", base), ("last", stages[0]), ("merged", pymerge.wise_ft(base, stages[0], alpha=0.5))):
        merger = SequentialMerger(base, "wise_ft", init=init, alpha=0.5)
        assert same(merger.next_init(), base)
        merger.add(stages[0], "sft")
        start = merger.next_init()
        assert same(start, want)
        start["w"].zero_()  # a copy
        assert same(merger.next_init(), want)


@pytest.mark.parametrize("method, settings", [("ema", {"decay": 0.5}), ("magmax", {})])
def test_a_restored_merger_goes_on(method, settings):
    base, stages = models()
    whole, first, second = (SequentialMerger(base, method, **settings) for _ in range(3))
    for stage in stages:
        whole.add(stage)
    first.add(stages[0], "sft")
    second.load_state_dict(first.state_dict())
    for stage in stages[1:]:
        second.add(stage)
    assert same(second.merged, whole.merged) and second.names[0] == "sft"
    with pytest.raises(ValueError, match="method"):
        SequentialMerger(base, "ties").load_state_dict(first.state_dict())


@pytest.mark.parametrize("arguments", [
    {"method": "mean"}, {"method": "ema"}, {"method": "ema", "decay": 1.5}, {"method": "wise_ft", "alpha": []},
    {"method": "ties", "init": "x"},
])  # fmt: skip
def test_what_makes_no_sense_is_said(arguments):
    with pytest.raises(ValueError):
        SequentialMerger(models()[0], **arguments)
