"""The plain recipe, beside the code it is defined by."""

import itertools

import pytest
import torch

import pymerge
from pymerge.replay import iter_replay_stream, make_replay_stream


def defined(new_data, old_data, replay_ratio=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cycle = itertools.cycle(old_data)
    stream = []
    for sample in new_data:
        stream.append(("new", sample))
        if torch.rand(1, generator=generator).item() < replay_ratio:
            stream.append(("old", next(cycle)))
    return stream


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_ten_thousand_samples_are_the_definition_s(seed):
    assert make_replay_stream(range(10_000), range(77), 0.3, seed) == defined(range(10_000), range(77), 0.3, seed)


def test_known_numbers():
    assert [tag for tag, _ in pymerge.make_replay_stream(range(4), range(100, 103), 0.5)] == [
        "new",
        "old",
        "new",
        "new",
        "old",
        "new",
        "old",
    ]
    counts = [sum(tag == "old" for tag, _ in make_replay_stream(range(n), range(9))) for n in (100, 1000, 10_000)]
    assert counts == [35, 306, 2951]


@pytest.mark.parametrize("ratio", [0.0, 1.0, 8325804 / 2**24, 0.1])
def test_the_comparison_is_strict_and_in_double(ratio):
    """8325804 / 2**24 is the first draw of seed 0 itself."""
    assert make_replay_stream(range(500), "abc", ratio) == defined(range(500), "abc", ratio)


def test_iterators_are_read_lazily_and_once():
    new = iter(range(10**9))
    stream = iter_replay_stream(new, iter([5, 6]), 1.0)
    assert list(itertools.islice(stream, 6)) == [("new", 0), ("old", 5), ("new", 1), ("old", 6), ("new", 2), ("old", 5)]
    assert next(new) <= 4


@pytest.mark.parametrize("empty", [[], iter(()), {}.values()])
def test_no_old_data_is_an_error_before_the_first_sample(empty):
    with pytest.raises(ValueError, match="old_data is empty"):
        iter_replay_stream([1], empty, 0.5)
    assert make_replay_stream([1, 2], [], 0.0) == [("new", 1), ("new", 2)]


@pytest.mark.parametrize("ratio", [-0.1, 1.5, 30, float("nan")])
def test_a_ratio_that_is_no_probability(ratio):
    with pytest.raises(ValueError, match="probability per new sample"):
        make_replay_stream([1], [2], ratio)
