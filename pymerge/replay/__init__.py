"""Replay of old data while training on new data: the first remedy against forgetting (docs/replay.md).

`make_replay_stream` is the whole idea in one call. `ReplayMixer` is the same for training runs: exact ratios over several sources, random
access, a state of a few integers, any number of ranks and workers. `curation` removes duplicates and evaluation data before mixing.
"""

from .curation import Curated, decontaminate, dedup_exact, filter_quality, minhash_dedup
from .loading import ReplayIterable, ReplaySampler
from .mixer import Draw, ReplayMixer
from .reservoir import ReservoirBuffer
from .stream import iter_replay_stream, make_replay_stream

__all__ = [
    "Curated",
    "Draw",
    "ReplayIterable",
    "ReplayMixer",
    "ReplaySampler",
    "ReservoirBuffer",
    "decontaminate",
    "dedup_exact",
    "filter_quality",
    "iter_replay_stream",
    "make_replay_stream",
    "minhash_dedup",
]
