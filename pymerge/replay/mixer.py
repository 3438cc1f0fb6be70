"""New data with old data mixed in: a fixed sequence that can be entered anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .order import Permutation, key_of
from .schedule import NEW, BernoulliSchedule, ExactSchedule, Schedule, TokenSchedule
from .settings import choose, share_of, sources_of, stages_of

__all__ = ["Draw", "ReplayMixer"]

VERSION = 1


@dataclass(frozen=True)
class Draw:
    """One place of the stream.

    Attributes:
        source: "new", "old", or the old source's name.
        index: of the sample in that source.
        repeat: how often that sample was used before, over all epochs (of the new data: the epoch).
    """

    source: str
    index: int
    repeat: int


class ReplayMixer:
    """A map-style dataset: one pass over new data with old data mixed in, the same in every process and every run.

    What stands at a place depends on the settings, the epoch and the place alone, so the state of a run is the pair (epoch, place): any
    number of ranks and workers reads the same stream (:class:`pymerge.replay.ReplaySampler`), and a run goes on where it was killed.

    Args:
        new: the new data: anything with a length and an index.
        old: the old data, or a mapping of names to several.
        ratio: the old samples' share of the stream, in [0, 1); 0.10 if `probability` is not given either.
        probability: instead of `ratio`, of an old sample after each new one: ``ratio / (1 - ratio)``. It is what
            :func:`pymerge.replay.make_replay_stream` calls its ratio.
        weights: of the old sources by name; by default in proportion to their lengths. 0 leaves a source out.
        schedule: (place, weights) pairs with ascending places: from that place of an epoch on, these weights.
        policy: ``"exact"``: the old samples among the first n places are ``floor(n ratio + 1/2)``, for every n, and each old source has its
            share of them, to about a sample; ``"bernoulli"``: an independent draw after each new sample. ``policy="bernoulli",
            order="sequential"`` is :func:`pymerge.replay.make_replay_stream`, to the bit.
        unit: ``"samples"`` or ``"tokens"``: what `ratio` and `weights` count. Tokens need `length_fn`, and the lengths of all samples
            that an epoch uses are asked for when it begins; every prefix is then within about one sample's tokens of the ratio.
        length_fn: the number of tokens of a sample.
        budget: ``"additive"``: all new samples, and the stream is longer for the old ones; ``"equal"``: as many samples (tokens) as the
            new data have, so that old samples take the place of new ones.
        order: ``"shuffle"``: a new random order of the new data in every epoch, and of an old source each time it has been used up;
            ``"sequential"``: their own order.
        seed: of orders and draws.
        max_repeats: how often an epoch may use any one old sample; more is an error when the mixer is made.
        tag: items are (source, sample); without it, samples.

    Raises:
        ValueError: a setting is out of range; an old source is empty; the old data do not last under `max_repeats`. The message says
            what would fit.
    """

    def __init__(
        self,
        new: Any,
        old: Any,
        *,
        ratio: float | None = None,
        probability: float | None = None,
        weights: Mapping[str, float] | None = None,
        schedule: Sequence[tuple[int, Mapping[str, float]]] = (),
        policy: str = "exact",
        unit: str = "samples",
        length_fn: Callable[[Any], int] | None = None,
        budget: str = "additive",
        order: str = "shuffle",
        seed: int = 0,
        max_repeats: int | None = None,
        tag: bool = True,
    ) -> None:
        self._names, self._data = sources_of(new, old)
        self._sizes = [len(data) for data in self._data]
        choose("policy", policy, ("exact", "bernoulli"))
        choose("unit", unit, ("samples", "tokens"))
        choose("budget", budget, ("additive", "equal"))
        choose("order", order, ("shuffle", "sequential"))
        if unit == "tokens" and (length_fn is None or policy == "bernoulli"):
            raise ValueError('unit="tokens" needs length_fn, and goes with policy="exact" only')
        if max_repeats is not None and max_repeats < 1:
            raise ValueError(f"max_repeats is {max_repeats}; a sample that is used at all is used once")
        self._share = share_of(ratio, probability, policy)
        self._stages = stages_of(self._names[1:], self._sizes[1:], weights, schedule, bool(self._share))
        self._policy, self._unit, self._budget, self._order, self._seed = policy, unit, budget, order, seed
        self._length_fn, self._max_repeats, self.tag = length_fn, max_repeats, tag
        self._orders: dict[int, tuple[int, Permutation]] = {}
        self._ended: list[list[int]] = [[0] * len(self._data)]  # by epoch: how much of each source earlier epochs used
        self._schedules: dict[int, Schedule] = {}
        self._resume: int | None = None
        self._place = 0
        self.set_epoch(0)

    # ---- places

    @property
    def epoch(self) -> int:
        """The epoch that places are of."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch: new data in a new order, old data on from where the epoch before ended."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; the first is 0")
        self._epoch = epoch
        self._schedule = self._schedule_of(epoch)
        self._place = 0

    def _schedule_of(self, epoch: int) -> Schedule:
        if epoch not in self._schedules:
            made = self._make_schedule(epoch)
            self._check_repeats(made)
            self._schedules = {e: s for e, s in self._schedules.items() if e == epoch - 1}  # two are enough to go on from one to the next
            self._schedules[epoch] = made
        return self._schedules[epoch]

    def _make_schedule(self, epoch: int) -> Schedule:
        new, equal = self._sizes[NEW], self._budget == "equal"
        if self._policy == "bernoulli":
            seed = self._seed if epoch == 0 else key_of("epoch", self._seed, epoch) >> 1
            return BernoulliSchedule(new, float(self._share / (1 - self._share)), seed, self._stages, new if equal else None)
        if self._unit == "samples":
            return ExactSchedule(new, self._share, self._stages, new if equal else None)
        share = float(self._share)
        shares = [(place, [1 - share, *(share * w / sum(ws) for w in ws)]) for place, ws in self._stages]
        budget = sum(map(self._length_fn, self._data[NEW])) if equal else None
        return TokenSchedule(new, shares, lambda source, i: self._length_fn(self._sample(source, self._index(source, i, epoch)[0])), budget)

    def _check_repeats(self, schedule: Schedule) -> None:
        if self._max_repeats is None:
            return
        for source, used in enumerate(schedule.counts(len(schedule))[1:], 1):
            have = self._sizes[source] * self._max_repeats
            if used > have:
                size = self._sizes[source]
                raise ValueError(
                    f"an epoch takes {used} samples of {self._names[source]!r}, which has {size}: each {used / size:.3g} times, and "
                    f"max_repeats is {self._max_repeats}. Lower ratio {float(self._share):.4g} or the source's weight by a factor of "
                    f"{used / have:.3g}, or allow max_repeats={math.ceil(used / size)}"
                )

    def _used_before(self, epoch: int) -> list[int]:
        while len(self._ended) <= epoch:
            schedule = self._schedule_of(len(self._ended) - 1)
            self._ended.append([a + b for a, b in zip(self._ended[-1], schedule.counts(len(schedule)))])
        return self._ended[epoch]

    def _index(self, source: int, number: int, epoch: int) -> tuple[int, int]:
        """(index, repeat) of the number-th sample that an epoch takes from a source."""
        size = self._sizes[source]
        if source == NEW:
            turn = epoch
        else:
            turn, number = divmod(self._used_before(epoch)[source] + number, size)
        if self._order == "sequential":
            return number, turn
        known = self._orders.get(source)
        if known is None or known[0] != turn:
            known = self._orders[source] = (turn, Permutation(size, key_of("order", self._seed, self._names[source], turn)))
        return known[1][number], turn

    def _sample(self, source: int, index: int) -> Any:
        return self._data[source][index]

    def _draw(self, place: int) -> tuple[int, int, int]:
        source, number = self._schedule.at(place)
        return source, *self._index(source, number, self._epoch)

    def at(self, place: int) -> Draw:
        """What stands at a place of this epoch, without reading the sample."""
        source, index, repeat = self._draw(self._checked(place))
        return Draw(self._names[source], index, repeat)

    def _checked(self, place: int) -> int:
        if not -len(self) <= place < len(self):
            raise IndexError(f"place {place} is outside this epoch's {len(self)}")
        return place % len(self)

    # ---- as a dataset

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, place: int) -> Any:
        source, index, _ = self._draw(self._checked(place))
        sample = self._sample(source, index)
        return (self._names[source], sample) if self.tag else sample

    def __iter__(self) -> Iterator[Any]:
        """The epoch from its beginning, or once from a loaded state on."""
        start, self._resume = self._resume or 0, None
        for place in range(start, len(self)):
            self._place = place + 1
            yield self[place]

    # ---- state

    def settings(self) -> dict[str, Any]:
        """What the stream depends on, in plain values."""
        return {
            "sizes": dict(zip(self._names, self._sizes)),
            "ratio": str(self._share),
            "weights": [[place, list(ws)] for place, ws in self._stages],
            "policy": self._policy,
            "unit": self._unit,
            "budget": self._budget,
            "order": self._order,
            "seed": self._seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Epoch and place of the iteration over this object; a sampler has its own."""
        return self.state_at(self._place)

    def state_at(self, place: int) -> dict[str, Any]:
        """The state of a reader that has had the first `place` places of this epoch."""
        return {"version": VERSION, "settings": self.settings(), "epoch": self._epoch, "place": place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next iteration begins there.

        Raises:
            ValueError: the state is of a stream with other data sizes or settings.
        """
        self._place = self._resume = self.place_in(state)

    def place_in(self, state: Mapping[str, Any]) -> int:
        """Check a state, go to its epoch and return its place."""
        if state.get("version") != VERSION:
            raise ValueError(f"the state has version {state.get('version')!r}; this pymerge reads {VERSION}")
        mine, theirs = self.settings(), state["settings"]
        changed = [f"{k} was {theirs.get(k)!r} and is {v!r}" for k, v in mine.items() if theirs.get(k) != v]
        if changed:
            raise ValueError("the state belongs to another stream: " + "; ".join(changed) + ". Start anew, or restore the old settings")
        self.set_epoch(state["epoch"])
        if not 0 <= state["place"] <= len(self):
            raise ValueError(f"the state's place is {state['place']}, but epoch {state['epoch']} has {len(self)}")
        return state["place"]

    # ---- accounts

    def report(self, length: int | None = None) -> dict[str, Any]:
        """What was asked for and what the first `length` places of this epoch (all, by default) are.

        Returns:
            ``requested`` and ``achieved`` (the old share, in the unit asked for), and by source ``samples``, ``share`` of the samples,
            ``passes`` (samples used over samples there are) and, for unit "tokens", the whole epoch's ``tokens``.
        """
        length = len(self) if length is None else length
        counts = self._schedule.counts(length)
        sources = {
            name: {"samples": count, "share": count / length if length else math.nan, "passes": count / size if size else 0.0}
            for name, count, size in zip(self._names, counts, self._sizes)
        }
        achieved = 1 - counts[NEW] / length if length else math.nan
        if isinstance(self._schedule, TokenSchedule):
            for name, tokens in zip(self._names, self._schedule.tokens):
                sources[name]["tokens"] = tokens
            total = sum(self._schedule.tokens)
            achieved = 1 - self._schedule.tokens[NEW] / total if total else math.nan
        return {"requested": float(self._share), "achieved": achieved, "unit": self._unit, "length": length, "sources": sources}
