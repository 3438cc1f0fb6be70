from collections import Counter

import pytest

from pymerge.replay import ReplayMixer, ReservoirBuffer


def test_every_sample_is_kept_with_the_same_probability():
    kept = Counter()
    for seed in range(2000):
        buffer = ReservoirBuffer(10, seed)
        buffer.extend(range(40))
        assert len(buffer) == 10 and buffer.seen == 40
        kept.update(buffer)
    # Binomial with n = 2000, p = 1/4: standard deviation 19.4
    assert all(abs(kept[i] - 500) < 5 * 19.4 for i in range(40))


def test_groups_are_balanced_as_far_as_they_go():
    buffer = ReservoirBuffer(30, 1, group_by=lambda x: x[0])
    buffer.extend([("common", i) for i in range(500)] + [("rare", i) for i in range(4)] + [("some", i) for i in range(100)])
    sizes = Counter(group for group, _ in buffer)
    assert sizes["rare"] == 4 and abs(sizes["common"] - sizes["some"]) <= 1


@pytest.mark.parametrize("group_by", [None, lambda x: x % 3])
def test_a_restored_buffer_goes_on_the_same(group_by):
    whole, first, second = (ReservoirBuffer(8, 2, group_by=group_by) for _ in range(3))
    whole.extend(range(200))
    first.extend(range(90))
    second.load_state_dict(first.state_dict())
    second.extend(range(90, 200))
    assert list(second) == list(whole)
    with pytest.raises(ValueError, match="capacity"):
        ReservoirBuffer(9, 2).load_state_dict(first.state_dict())


def test_a_buffer_is_an_old_source():
    buffer = ReservoirBuffer(5)
    buffer.extend(range(100))
    assert {x for tag, x in ReplayMixer(range(45), buffer, ratio=0.1) if tag == "old"} == set(buffer)


def test_an_empty_capacity():
    with pytest.raises(ValueError):
        ReservoirBuffer(0)
