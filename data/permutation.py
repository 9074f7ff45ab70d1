"""A seeded permutation of 0 .. n-1 that is computed, not stored: any entry at once, the same on every machine.

A Feistel network permutes 0 .. 4^k - 1 (the smallest power that holds n); an index that lands beyond n is permuted
again until it does not (cycle walking), which keeps the map one-to-one on 0 .. n-1.
"""

import hashlib

import numpy as np

ROUNDS = 6


def round_keys(*parts: int | str) -> np.ndarray:
    """(ROUNDS,) uint64 from anything that names a permutation, e.g. (seed, "windows", epoch)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where each index (int64, in 0 .. n-1) is sent, int64 of the same shape.

    Raises ValueError for an index outside of 0 .. n-1, which could walk for ever.
    """
    index = np.asarray(index)
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise ValueError(
            f"a permutation of {n} was asked for indices {index.min()} .. {index.max()}: give indices from 0 to {n - 1}"
        )
    bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)
    value = np.atleast_1d(index).astype(np.uint64)
    walking = np.ones(value.shape, bool)
    while walking.any():
        left, right = value[walking] >> bits, value[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value[walking] = (left << bits) | right
        walking = value >= n
    return value.astype(np.int64).reshape(index.shape)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
