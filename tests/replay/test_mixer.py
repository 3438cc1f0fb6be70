"""What a mixer promises: the ratio in every prefix, each sample in turn, the same stream from any place on."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge.replay import Draw, ReplayMixer, make_replay_stream
from pymerge.replay.order import Permutation

SIZES = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 40), min_size=1, max_size=5)
SHARE = st.integers(0, 95).map(lambda n: n / 100)


def mixers(draw, **fixed):
    sizes = draw(SIZES)
    weights = {name: draw(st.integers(0, 9)) for name in sizes}
    weights[min(sizes)] += 1
    return ReplayMixer(range(draw(st.integers(1, 200))), {n: range(s) for n, s in sizes.items()}, weights=weights, **fixed), weights


@given(st.data(), SHARE, st.sampled_from(["additive", "equal"]))
@settings(max_examples=60, deadline=None)
def test_every_prefix_keeps_the_ratio(data, ratio, budget):
    mixer, weights = mixers(data.draw, ratio=ratio, budget=budget)
    total, counts = sum(weights.values()), Counter()
    for place in range(len(mixer)):
        counts[mixer.at(place).source] += 1
        n = place + 1
        assert abs(n - counts["new"] - ratio * n) <= 0.5 + 1e-9
        for name, weight in weights.items():
            assert abs(counts[name] - ratio * weight / total * n) < 2
        assert mixer.report(n)["sources"]["new"]["samples"] == counts["new"]
    achieved = {name: s["samples"] for name, s in mixer.report()["sources"].items()}
    assert achieved == {name: counts[name] for name in achieved}


def test_two_old_sources_stay_within_one_sample():
    mixer = ReplayMixer(range(2000), {"a": range(9), "b": range(9)}, ratio=0.23, weights={"a": 0.3, "b": 0.7})
    counts = Counter()
    for n in range(1, len(mixer) + 1):
        counts[mixer.at(n - 1).source] += 1
        assert abs(counts["a"] - 0.23 * 0.3 * n) < 1 and abs(counts["b"] - 0.23 * 0.7 * n) < 1


@given(st.data(), SHARE)
@settings(max_examples=30, deadline=None)
def test_new_samples_come_once_and_old_ones_evenly(data, ratio):
    mixer, _ = mixers(data.draw, ratio=ratio)
    draws = [mixer.at(place) for place in range(len(mixer))]
    assert sorted(d.index for d in draws if d.source == "new") == list(range(mixer.report()["sources"]["new"]["samples"]))
    for name in {d.source for d in draws} - {"new"}:
        uses = Counter(d.index for d in draws if d.source == name)
        assert max(uses.values()) - min(uses.values(), default=0) <= 1 or len(uses) < mixer.settings()["sizes"][name]
        seen = Counter()
        for d in draws:
            if d.source == name:
                assert d.repeat == seen[d.index]
                seen[d.index] += 1


@given(st.data(), st.sampled_from(["exact", "bernoulli"]), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_random_access_is_the_sequence(data, policy, epoch):
    mixer, _ = mixers(data.draw, ratio=0.3, policy=policy)
    mixer.set_epoch(epoch)
    items = list(mixer)
    for place in data.draw(st.lists(st.integers(0, len(items) - 1), max_size=20)):
        assert mixer[place] == items[place]
    assert mixer[-1] == items[-1]
    with pytest.raises(IndexError):
        mixer[len(items)]


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_bernoulli_in_order_is_the_plain_recipe(seed):
    mixer = ReplayMixer(range(3000), range(77), probability=0.3, policy="bernoulli", order="sequential", seed=seed)
    assert list(mixer) == make_replay_stream(range(3000), range(77), 0.3, seed)


def test_old_data_go_on_over_epochs_and_new_data_are_reshuffled():
    mixer = ReplayMixer(range(90), range(15), ratio=0.1, seed=3)
    epochs = []
    for epoch in range(3):
        mixer.set_epoch(epoch)
        epochs.append([mixer.at(p) for p in range(len(mixer))])
    new = [[d.index for d in draws if d.source == "new"] for draws in epochs]
    assert all(sorted(order) == list(range(90)) for order in new) and new[0] != new[1] != new[2]
    old = [d.index for draws in epochs for d in draws if d.source == "old"]
    assert sorted(old[:15]) == list(range(15)) and old[15:30] != old[:15] and sorted(old[15:30]) == list(range(15))


def test_weights_change_at_a_place_and_nothing_is_lost():
    a, b = range(1000), range(1000)
    mixer = ReplayMixer(range(900), {"a": a, "b": b}, ratio=0.5, weights={"a": 1, "b": 0}, schedule=[(600, {"a": 1, "b": 3})])
    draws = [mixer.at(p) for p in range(len(mixer))]
    before, after = Counter(d.source for d in draws[:600]), Counter(d.source for d in draws[600:1600])
    assert (before["a"], before["b"]) == (300, 0)
    assert abs(after["a"] - 125) <= 1 and abs(after["b"] - 375) <= 1
    for name in "ab":
        used = [d.index for d in draws if d.source == name]
        assert len(used) == len(set(used))  # the counters were carried over: nothing came twice


@given(st.data(), st.integers(1, 49))
@settings(max_examples=30, deadline=None)
def test_tokens_keep_the_ratio_to_a_sample(data, percent):
    lengths = [data.draw(st.integers(1, 50)) for _ in range(120)]
    new, old = [("n", n) for n in lengths], [("o", n) for n in reversed(lengths)]
    mixer = ReplayMixer(new, old, ratio=percent / 100, unit="tokens", length_fn=lambda sample: sample[1])
    tokens = Counter()
    for source, (_, size) in mixer:
        tokens[source] += size
        assert abs(tokens["old"] - percent / 100 * tokens.total()) <= max(lengths)
    report = mixer.report()
    assert report["sources"]["old"]["tokens"] == tokens["old"] and report["sources"]["new"]["samples"] == 120
    assert report["achieved"] == pytest.approx(tokens["old"] / tokens.total())


def test_equal_budget_takes_the_place_of_new_data():
    mixer = ReplayMixer(range(1000), range(50), ratio=0.25, budget="equal")
    assert len(mixer) == 1000 and mixer.report()["sources"]["new"]["samples"] == 750
    samples = [[1] * 7] * 40
    by_tokens = ReplayMixer(samples, samples, ratio=0.25, budget="equal", unit="tokens", length_fn=len)
    assert sum(len(sample) for _, sample in by_tokens) == 40 * 7


def test_the_cap_on_repeats_says_what_would_fit():
    with pytest.raises(ValueError, match="takes 100 samples of 'old', which has 10: each 10 times.*max_repeats=10"):
        ReplayMixer(range(900), range(10), ratio=0.1, max_repeats=3)
    assert len(ReplayMixer(range(900), range(10), ratio=0.1, max_repeats=10)) == 1000


@pytest.mark.parametrize("build", [
    lambda: ReplayMixer([1], [2], ratio=0.1, probability=0.1),
    lambda: ReplayMixer([1], [2], ratio=1.0),
    lambda: ReplayMixer([1], [2], ratio=10),
    lambda: ReplayMixer([1], [2], ratio=0.6, policy="bernoulli"),
    lambda: ReplayMixer([1], []),
    lambda: ReplayMixer([1], {"a": [1], "b": []}, weights={"a": 1, "b": 1}),
    lambda: ReplayMixer([1], {"new": [1]}),
    lambda: ReplayMixer([1], {}),
    lambda: ReplayMixer([1], {"a": [1]}, weights={"b": 1}),
    lambda: ReplayMixer([1], {"a": [1]}, weights={"a": 0}),
    lambda: ReplayMixer([1], {"a": [1]}, weights={"a": float("nan")}),
    lambda: ReplayMixer([1], [2], schedule=[(0, {"old": 1})]),
    lambda: ReplayMixer([1], [2], unit="tokens"),
    lambda: ReplayMixer([1], [2], policy="random"),
    lambda: ReplayMixer([1], [2], max_repeats=0),
    lambda: ReplayMixer([1], [2]).set_epoch(-1),
])  # fmt: skip
def test_settings_that_make_no_sense(build):
    with pytest.raises(ValueError):
        build()


def test_one_shot_data_are_refused_with_a_hint():
    with pytest.raises(TypeError, match="iter_replay_stream"):
        ReplayMixer(iter([1]), [2])


def test_a_ratio_of_zero_needs_no_old_data():
    assert list(ReplayMixer([1, 2], [], ratio=0, order="sequential")) == [("new", 1), ("new", 2)]
    assert list(ReplayMixer([1, 2], [], ratio=0, order="sequential", tag=False)) == [1, 2]


def test_a_source_of_weight_zero_may_be_empty_and_is_never_drawn():
    mixer = ReplayMixer(range(50), {"a": [1], "b": []}, ratio=0.5, weights={"a": 1, "b": 0})
    assert {mixer.at(p).source for p in range(len(mixer))} == {"new", "a"}


def test_a_state_of_other_settings_is_refused_by_name():
    state = ReplayMixer(range(9), range(5), ratio=0.2).state_dict()
    with pytest.raises(ValueError, match="ratio was '1/5' and is '3/10'"):
        ReplayMixer(range(9), range(5), ratio=0.3).load_state_dict(state)
    with pytest.raises(ValueError, match="version"):
        ReplayMixer(range(9), range(5)).load_state_dict({"version": 99})


@pytest.mark.parametrize("n", [1, 2, 3, 7, 2048, 2049, 5000, 70_001])
def test_orders_are_permutations(n):
    order = Permutation(n, 5)
    assert sorted(order[i] for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [6, 3000])
def test_orders_look_uniform(n):
    """Where an element lands, over many keys: chi-square of 6 equal bins, 5 degrees of freedom."""
    bins = [Counter(Permutation(n, key)[i] * 6 // n for key in range(600)) for i in (0, 1, n - 1)]
    for counts in bins:
        assert sum((counts[b] - 100) ** 2 / 100 for b in range(6)) < 25


def test_the_stream_is_what_it_was():
    """Committed streams: a change would break every state that users have saved."""
    mixer = ReplayMixer(range(6), {"a": range(3), "b": range(2)}, ratio=0.4, seed=1)
    assert [mixer.at(p) for p in range(len(mixer))] == GOLDEN


GOLDEN = [
    Draw("new", 3, 0),
    Draw("a", 0, 0),
    Draw("new", 4, 0),
    Draw("b", 1, 0),
    Draw("new", 0, 0),
    Draw("new", 5, 0),
    Draw("a", 2, 0),
    Draw("new", 1, 0),
    Draw("b", 0, 0),
    Draw("new", 2, 0),
]
