"""Random numbers that are a function of (seed, query id, stream, index) and of nothing else.

In go a seed, query ids and the name of a stream; out come uniform or Gumbel numbers, float64. No
generator is advanced, so how queries are batched, ordered or spread over workers cannot change a
draw. The mixer is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"), applied once per key and once per number.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)

Keys = npt.NDArray[np.uint64]


def keys(seed: int, query_ids: npt.NDArray[np.int64], stream: str) -> Keys:
    """One 64-bit key per query for the named stream, [B] uint64."""
    start = hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8]
    return _mix(_mix(query_ids.astype(np.uint64)) ^ np.uint64(int.from_bytes(start, "little")))


def uniform(key: Keys, count: int) -> npt.NDArray[np.float64]:
    """``count`` numbers in the open interval (0, 1) per key, [B, count] float64."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(key[:, None] + counter)
    # 53 bits and a half: never 0 and never 1
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gumbel(key: Keys, count: int) -> npt.NDArray[np.float64]:
    """``count`` standard Gumbel numbers per key, [B, count] float64.

    The arg max of log-weights plus Gumbel numbers is a draw from their softmax.
    """
    return -np.log(-np.log(uniform(key, count)))


def _mix(value: Keys) -> Keys:
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    mixed: Keys = value ^ (value >> np.uint64(31))
    return mixed
