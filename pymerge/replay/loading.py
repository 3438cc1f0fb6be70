"""A mixer behind torch's and torchdata's data loaders: the same stream for any number of ranks and workers, also after a kill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, Sampler, get_worker_info

from .mixer import ReplayMixer

__all__ = ["ReplayIterable", "ReplaySampler"]


class ReplaySampler(Sampler[int]):
    """The places of a mixer that one rank reads: ``DataLoader(mixer, sampler=ReplaySampler(mixer), batch_size=..., num_workers=...)``.

    Rank r of W reads places r, r + W, r + 2 W, ... The state is the epoch and the number of places that all ranks together have read, so
    another number of ranks can go on from it. Any number of workers gives the same batches.

    Args:
        mixer: the stream.
        rank, world_size: this process's number and how many there are.
        drop_last: leave out the last ``len(mixer) % world_size`` places, so that all ranks read equally many. Otherwise some ranks read
            one more, which hangs training loops that synchronise ranks at every step.
    """

    def __init__(self, mixer: ReplayMixer, rank: int = 0, world_size: int = 1, *, drop_last: bool = False) -> None:
        _check_rank(rank, world_size)
        self.mixer, self.rank, self.world_size, self.drop_last = mixer, rank, world_size, drop_last
        self._start = self._place = 0

    def _stop(self) -> int:
        left = len(self.mixer) - self._start
        return self._start + (left - left % self.world_size if self.drop_last else left)

    def __len__(self) -> int:
        return len(range(self._start + self.rank, self._stop(), self.world_size))

    def __iter__(self) -> Iterator[int]:
        for place in range(self._start + self.rank, self._stop(), self.world_size):
            self._place = place - self.rank + self.world_size
            yield place
        self._start = self._place = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch at its first place."""
        self.mixer.set_epoch(epoch)
        self._start = self._place = 0

    def state_dict(self) -> dict[str, Any]:
        """After the places that were read from this sampler. A loader with workers reads ahead: ask the loader then, or count batches."""
        return self.mixer.state_at(min(self._place, len(self.mixer)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of any number of ranks."""
        self._start = self._place = self.mixer.place_in(state)


class ReplayIterable(IterableDataset):
    """A mixer as an iterable dataset, for loaders that want one.

    Workers take blocks of `block` places in turn. With the loader's batch size as `block`, the batches are the same for any number of
    workers. For torchdata's StatefulDataLoader each worker keeps the state of its own part.

    Args:
        mixer, rank, world_size: as :class:`ReplaySampler` has them.
        block: places that a worker reads at a stretch; the loader's batch size.
    """

    def __init__(self, mixer: ReplayMixer, rank: int = 0, world_size: int = 1, *, block: int = 1) -> None:
        _check_rank(rank, world_size)
        if block < 1:
            raise ValueError(f"block is {block}; at least one place is read at a stretch")
        self.mixer, self.rank, self.world_size, self.block = mixer, rank, world_size, block
        self._resume: int | None = None
        self._done = 0  # places that this worker has given

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        done, self._resume = self._resume or 0, None
        own = range(self.rank, len(self.mixer), self.world_size)
        while True:
            turn, within = divmod(done, self.block)
            at = (turn * workers + worker) * self.block + within
            if at >= len(own):
                break
            done += 1
            self._done = done
            yield self.mixer[own[at]]
        self._done = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; with persistent workers it does not reach them: make the loader anew."""
        self.mixer.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Of this worker. It fits the same numbers of ranks and workers only."""
        info = get_worker_info()
        shape = [self.rank, self.world_size, info.id if info else 0, info.num_workers if info else 1, self.block]
        return {**self.mixer.state_at(0), "part": shape, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another part of the stream.
        """
        part = self.state_dict()["part"]
        if state["part"] != part:
            raise ValueError(
                f"the state is of [rank, world_size, worker, workers, block] {state['part']}, this is {part}; "
                "ReplaySampler can go on with other numbers"
            )
        self.mixer.place_in(state)
        self._resume = self._done = state["done"]


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of world_size {world_size}; ranks count from 0")
