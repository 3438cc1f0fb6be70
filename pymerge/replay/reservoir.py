"""A sample of fixed size of everything seen so far, for rounds whose data cannot be kept."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

from .order import key_of, mix64

__all__ = ["ReservoirBuffer"]

VERSION = 1


class ReservoirBuffer:
    """Keeps a uniform sample of a stream of unknown length: Algorithm R (Vitter 1985); or one balanced over groups.

    The draws depend on the seed and on how many samples came before, so a buffer with the same history is the same buffer. It has a length
    and an index and can be an old source of :class:`pymerge.replay.ReplayMixer`.

    With `group_by` it is class-balancing reservoir sampling (Chrysakis and Moens 2020): once full, a sample of a group that was never the
    largest takes the place of a random one of the largest group; within the largest groups Algorithm R decides.

    Args:
        capacity: samples kept.
        seed: of the draws.
        group_by: the group (task, class, language) of a sample.
    """

    def __init__(self, capacity: int, seed: int = 0, *, group_by: Callable[[Any], Hashable] | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a buffer keeps at least one sample")
        self.capacity, self.seed = capacity, seed
        self._group_by = group_by
        self._items: list[Any] = []
        self._groups: list[Hashable] = []
        self._places: dict[Hashable, list[int]] = {}  # by group: where its samples are, ascending
        self._seen: dict[Hashable, int] = {}
        self._full: set[Hashable] = set()  # groups that have been the largest
        self._count = 0

    @property
    def seen(self) -> int:
        """Samples added so far."""
        return self._count

    def add(self, sample: Any) -> None:
        """Show a sample to the buffer."""
        group = self._group_by(sample) if self._group_by is not None else None
        number = self._count
        self._count += 1
        self._seen[group] = self._seen.get(group, 0) + 1
        if len(self._items) < self.capacity:
            self._places.setdefault(group, []).append(len(self._items))
            self._items.append(sample)
            self._groups.append(group)
            return
        most = max(map(len, self._places.values()))
        largest = [g for g, places in self._places.items() if len(places) == most]
        self._full.update(largest)
        if group in self._full:
            own = self._places.get(group, [])
            at = self._below(self._seen[group], number)
            if at < len(own):
                self._items[own[at]] = sample
            return
        chosen = self._below(most * len(largest), number)
        given_up = largest[chosen // most]
        place = self._places[given_up].pop(chosen % most)
        insort(self._places.setdefault(group, []), place)
        self._items[place], self._groups[place] = sample, group

    def extend(self, samples: Iterable) -> None:
        """:meth:`add` each."""
        for sample in samples:
            self.add(sample)

    def _below(self, n: int, number: int) -> int:
        return (mix64(key_of("reservoir", self.seed) ^ mix64(number)) * n) >> 64

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Any:
        return self._items[i]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def state_dict(self) -> dict[str, Any]:
        """Everything, the samples included."""
        return {
            "version": VERSION, "capacity": self.capacity, "seed": self.seed, "count": self._count, "items": list(self._items),
            "groups": list(self._groups), "order": list(self._places), "seen": dict(self._seen), "full": list(self._full),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the buffer that the state is of.

        Raises:
            ValueError: it is of another version, capacity or seed.
        """
        mine = (VERSION, self.capacity, self.seed)
        theirs = tuple(state.get(k) for k in ("version", "capacity", "seed"))
        if theirs != mine:
            raise ValueError(f"the state's (version, capacity, seed) is {theirs}, this buffer's {mine}")
        self._items, self._groups = list(state["items"]), list(state["groups"])
        self._seen, self._full, self._count = dict(state["seen"]), set(state["full"]), state["count"]
        self._places = {group: [] for group in state["order"]}
        for place, group in enumerate(self._groups):
            self._places[group].append(place)
