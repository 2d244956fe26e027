"""Which query ids a file has shown so far, in little memory: to find one that comes twice."""

from __future__ import annotations

import numpy as np


class SeenIds:
    """Query ids met so far: a table of bytes for ids below 2^25 (33 MB at most), else a set."""

    def __init__(self) -> None:
        self._low = np.zeros(1 << 14, dtype=bool)
        self._high: set[int] = set()

    def has_any(self, ids: np.ndarray) -> bool:
        """Whether any of these ids was met before."""
        low = ids[ids < len(self._low)]
        return bool(self._low[low].any()) or (
            bool(self._high) and not self._high.isdisjoint(ids.tolist())
        )

    def add(self, ids: np.ndarray) -> bool:
        """Remember these ids; False, and nothing is remembered, where one was met before."""
        if self.has_any(ids):
            return False
        low = ids[ids < 1 << 25]
        if low.size:
            if int(low.max()) >= len(self._low):
                grown = np.zeros(1 << int(low.max()).bit_length(), dtype=bool)
                grown[: len(self._low)] = self._low
                self._low = grown
            self._low[low] = True
        self._high.update(ids[ids >= 1 << 25].tolist())
        return True
