"""Behind real data loaders: the same stream for any ranks and workers, and after a kill."""

import pytest
from torch.utils.data import DataLoader

from pymerge.replay import ReplayIterable, ReplayMixer, ReplaySampler


def mixer(epoch=0):
    made = ReplayMixer(list(range(97)), {"a": list(range(13)), "b": list(range(5))}, ratio=0.3, seed=4)
    made.set_epoch(epoch)
    return made


def flat(batches):
    return [(tag, int(x)) for tags, xs in batches for tag, x in zip(tags, xs)]


def test_resuming_at_fifty_places_differs_nowhere():
    whole = list(mixer(1))
    for place in range(0, len(whole), max(1, len(whole) // 50)):
        first, second = mixer(1), mixer()
        read = [item for _, item in zip(range(place), first)]
        second.load_state_dict(first.state_dict())
        assert read + list(second) == whole
        assert list(second) == whole  # the state is used once


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_gives_one_stream_for_any_workers(workers):
    m = mixer()
    loader = DataLoader(m, batch_size=4, sampler=ReplaySampler(m), num_workers=workers)
    assert flat(loader) == list(mixer())


def test_ranks_share_the_stream_and_another_number_of_ranks_goes_on():
    m = mixer(2)
    whole = list(range(len(m)))
    first = [ReplaySampler(mixer(2), r, 3) for r in range(3)]
    ranks = [iter(sampler) for sampler in first]
    read = [next(rank) for _ in range(10) for rank in ranks]
    assert read == whole[:30]
    state = first[1].state_dict()
    resumed = [ReplaySampler(mixer(), r, 2) for r in range(2)]
    for sampler in resumed:
        sampler.load_state_dict(state)
    left = [list(s) for s in resumed]
    assert [len(x) for x in left] == [len(range(30 + r, len(m), 2)) for r in range(2)]
    assert sorted(left[0] + left[1]) == whole[30:] and left[0][0] == 30


def test_drop_last_makes_ranks_equal():
    samplers = [ReplaySampler(mixer(), r, 4, drop_last=True) for r in range(4)]
    assert len({len(list(s)) for s in samplers}) == 1 and len(samplers[0]) == len(mixer()) // 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_gives_the_same_batches_for_any_workers(workers):
    loader = DataLoader(ReplayIterable(mixer(), block=4), batch_size=4, num_workers=workers)
    assert flat(loader) == list(mixer())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["sampler", "iterable"])
def test_torchdata_s_loader_resumes(workers, kind):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        m = mixer(1)
        if kind == "sampler":
            return stateful.StatefulDataLoader(m, batch_size=4, sampler=ReplaySampler(m), num_workers=workers)
        return stateful.StatefulDataLoader(ReplayIterable(m, block=4), batch_size=4, num_workers=workers)

    whole = flat(loader())
    assert whole == list(mixer(1))
    for stop in (0, 1, 7):
        first = loader()
        read, batches = [], iter(first)
        for _ in range(stop):
            read.append(next(batches))
        second = loader()
        second.load_state_dict(first.state_dict())
        assert flat(read) + flat(second) == whole


def test_a_worker_s_state_fits_no_other_part():
    state = ReplayIterable(mixer(), 0, 2).state_dict()
    with pytest.raises(ValueError, match="ReplaySampler"):
        ReplayIterable(mixer(), 1, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="rank"):
        ReplaySampler(mixer(), 2, 2)


def test_hugging_face_datasets_are_sources():
    datasets = pytest.importorskip("datasets")
    new = datasets.Dataset.from_dict({"text": [f"new {i}" for i in range(20)]})
    old = datasets.Dataset.from_dict({"text": [f"old {i}" for i in range(5)]})
    items = list(ReplayMixer(new, old, ratio=0.2))
    assert len(items) == 25 or len(items) == 24
    assert all(sample["text"].startswith(tag) for tag, sample in items)
