"""Philox4x32-10 (Salmon et al. 2011, figure 2) in NumPy words, and the package's use of it for DARE masks."""

import hashlib

import numpy as np


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """[4, n] uint32 counters -> [4, n] uint32 draws."""
    c0, c1, c2, c3 = (row.astype(np.uint64) for row in counter)
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)  # 32 x 32 bits fit in 64
        high, low = np.uint64(32), np.uint64(0xFFFFFFFF)
        c0, c1, c2, c3 = (right >> high) ^ c1 ^ np.uint64(k0), right & low, (left >> high) ^ c3 ^ np.uint64(k1), left & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def keep_mask(n: int, density: float, seed: int, name: str, model: int) -> np.ndarray:
    return keep_draws(n, seed, name, model) < np.uint64(round(density * 2**32))


def keep_draws(n: int, seed: int, name: str, model: int) -> np.ndarray:
    tensor = int.from_bytes(hashlib.blake2s(name.encode()).digest()[:4], "little") if name else 0
    groups = np.arange(-(-n // 4), dtype=np.uint64)
    counter = np.stack([groups & 0xFFFFFFFF, groups >> np.uint64(32), np.full_like(groups, tensor), np.full_like(groups, model)])
    return philox4x32(counter, (seed % 2**32, seed >> 32)).T.reshape(-1)[:n].astype(np.uint64)
