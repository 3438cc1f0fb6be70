"""Random orders that can be asked for any place at once: a permutation from a key, with nothing stored.

Large ranges use a Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), small ones, where
so few bits would mix badly, a plain shuffle. Neither depends on Python's, NumPy's or torch's generators, so orders never change with them.
"""

from __future__ import annotations

import hashlib

__all__ = ["Permutation", "key_of", "mix64"]

SMALL = 2048
ROUNDS = 4
_MASK = 2**64 - 1


def mix64(x: int) -> int:
    """A 64-bit hash of a 64-bit integer (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key_of(*parts: object) -> int:
    """64 bits from any printable values, the same in every process."""
    text = "\0".join(map(repr, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Permutation:
    """A permutation of ``range(n)`` chosen by a 64-bit key; ``p[i]`` costs microseconds and the object some bytes."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self._order: list[int] | None = None
        if n <= SMALL:
            order = list(range(n))
            for i in range(n - 1, 0, -1):
                j = (mix64(key ^ mix64(i)) * (i + 1)) >> 64
                order[i], order[j] = order[j], order[i]
            self._order = order
        else:
            self._half = ((n - 1).bit_length() + 1) // 2
            self._low = (1 << self._half) - 1
            self._keys = [mix64(key ^ mix64(i)) for i in range(ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(f"{i} is outside range({self.n})")
        if self._order is not None:
            return self._order[i]
        while True:  # the network permutes a range of up to four times n: walk on until inside
            left, right = i >> self._half, i & self._low
            for key in self._keys:
                left, right = right, left ^ (mix64(key ^ right) & self._low)
            i = left << self._half | right
            if i < self.n:
                return i
