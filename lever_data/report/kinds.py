"""Kinds of candidates, and how rewards spread among the sources of a query.

In go the numbers of an audit's batches, those of a query together; out come counts and sums by
source: what ``sums.py`` adds up of one batch after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DIMENSIONS = ("gen_method", "temperature", "beam_rank", "shot_num")
KIND = (*DIMENSIONS, "eval_mode", "correct")  # columns of few values, looked up together
_MOST_KINDS = 500
_MOST_CELLS = 1 << 21  # of a source in a query, at once


class OddRowsError(Exception):
    """Rows that are not summed here: a key is missing, or a number is not finite or too large."""


def numbers(rows: pa.RecordBatch, name: str) -> NDArray[Any]:
    """A column [rows] without nulls.

    Raises:
        OddRowsError: it has some.
    """
    if rows.column(name).null_count:
        raise OddRowsError(name)
    found: NDArray[Any] = rows.column(name).to_numpy()
    return found


class Kinds:
    """The combinations of source, evaluation mode and verdict that candidates have, by number."""

    def __init__(self, fallback: int) -> None:
        self._fallback = fallback  # the number of this evaluation mode
        self._hashes = np.empty(0, np.uint64)  # in order
        self._number = np.empty(0, np.int64)  # of each
        self._sums = np.zeros((2, 0))  # candidates and rewards
        self.sources: list[dict[str, Any]] = []
        self.source: list[int] = []  # of each kind, by number
        self.is_first_beam: list[bool] = []
        self.counted: dict[str, list[bool]] = {
            f"num_{name}": [] for name in ("right", "wrong", "unscored", "fallback", "unknown")
        }

    def numbers(self, rows: pa.RecordBatch) -> Ints:
        """The kind of each row; a new one gets the next number."""
        hashes = numbers(rows, "kind")
        places = np.searchsorted(self._hashes, hashes)
        # one search of a row for six columns: each alone took as long
        known = np.append(self._hashes, 0)[places] == hashes
        if (known & (places < len(self._hashes))).all():
            return self._number[places]
        for new, first in zip(*np.unique(hashes, return_index=True), strict=True):
            if new not in self._hashes:
                self._learn(new, {n: rows.column(n)[int(first)].as_py() for n in KIND})
        return self._number[np.searchsorted(self._hashes, hashes)]

    def _learn(self, new: np.uint64, values: dict[str, Any]) -> None:
        mode, correct = values.pop("eval_mode"), values.pop("correct")
        temperature = values["temperature"]
        if len(self.source) == _MOST_KINDS or not math.isfinite(temperature or 0):
            raise OddRowsError("kinds of candidates")
        if values not in self.sources:
            self.sources.append(values)
        place = int(np.searchsorted(self._hashes, new))
        self._hashes = np.insert(self._hashes, place, new)
        self._number = np.insert(self._number, place, len(self.source))
        self.source.append(self.sources.index(values))
        self.is_first_beam.append(values["beam_rank"] == 0)
        told = (correct == 1, correct == 0, correct is None, mode == self._fallback, mode == 0)
        for counted, is_so in zip(self.counted.values(), told, strict=True):
            counted.append(is_so)

    def add(self, numbers: Ints, reward: Floats) -> None:
        """Count candidates of these kinds and their rewards."""
        size = len(self.source)
        self._sums = np.pad(self._sums, ((0, 0), (0, size - self._sums.shape[1])))
        self._sums[0] += np.bincount(numbers, None, size)
        self._sums[1] += np.bincount(numbers, reward, size)

    def sums(self, dimension: str) -> dict[Any, tuple[int, int, float]]:
        """Candidates, right ones and their rewards by each value of a dimension, None for null."""
        found: dict[Any, tuple[int, int, float]] = {}
        for kind, source in enumerate(self.source):
            value = self.sources[source][dimension]
            count, right, reward = found.get(value, (0, 0, 0.0))
            more, rewards = self._sums[:, kind]
            right += int(more) * self.counted["num_right"][kind]
            found[value] = (count + int(more), right, reward + rewards)
        return found


class Sources:
    """How rewards spread among the sources of a query, over the queries whose rewards differ."""

    def __init__(self) -> None:
        # dimension → value → squares around the mean in the query, queries that need the value
        self.sums: dict[str, dict[Any, tuple[float, int]]] = {name: {} for name in DIMENSIONS}

    def add(
        self, sources: Sequence[Mapping[str, Any]], source: Ints, query: Ints, reward: Floats
    ) -> None:
        """Add whole queries: of every candidate its source, its query from 0 and its reward."""
        step = max(1, _MOST_CELLS // max(1, len(sources)))
        for first in range(0, int(query.max(initial=-1)) + 1, step):
            own = slice(*np.searchsorted(query, (first, first + step)))
            queries = query[own] - first
            cells = _Cells.of(len(sources), source[own], queries, reward[own])
            for name in DIMENSIONS:
                self._add(name, [row[name] for row in sources], cells)

    def _add(self, name: str, values: Sequence[Any], cells: _Cells) -> None:
        found = {
            value: cells.joined([i for i, own in enumerate(values) if own == value])
            for value in dict.fromkeys(values)
        }
        lows = np.stack([joined.low for joined in found.values()])
        highs = np.stack([joined.high for joined in found.values()])
        others_low, others_high = _without_own(lows), -_without_own(-highs)
        for k, (value, joined) in enumerate(found.items()):
            needed = (joined.count > 0) & (others_low[k] >= others_high[k])
            squares, needing = self.sums[name].get(value, (0.0, 0))
            self.sums[name][value] = (
                squares + float(joined.squares.sum()),
                needing + int(needed.sum()),
            )


@dataclass(frozen=True)
class _Cells:
    """Candidates by source and query, [sources, queries] or [queries]: their number and mean, the
    squares around it, the smallest and the largest reward (inf and -inf where there is none)."""

    count: NDArray[Any]
    mean: Floats
    squares: Floats
    low: Floats
    high: Floats

    @classmethod
    def of(cls, sources: int, source: Ints, query: Ints, reward: Floats) -> _Cells:
        shape = (sources, int(query[-1]) + 1)
        cell, size = source * shape[1] + query, shape[0] * shape[1]
        count: NDArray[Any] = np.bincount(cell, None, size)
        mean = np.bincount(cell, reward, size) / np.maximum(count, 1)
        deviation = reward - mean[cell]
        low, high = np.full(size, np.inf), np.full(size, -np.inf)
        np.minimum.at(low, cell, reward)
        np.maximum.at(high, cell, reward)
        squares = np.bincount(cell, deviation * deviation, size)
        fields: tuple[NDArray[Any], ...] = (count, mean, squares, low, high)
        return cls(*[field.reshape(shape) for field in fields])

    def joined(self, sources: Sequence[int]) -> _Cells:
        """These sources taken together."""
        if len(sources) == 1:
            one = sources[0]
            fields = (self.count, self.mean, self.squares, self.low, self.high)
            return _Cells(*[field[one] for field in fields])
        own = list(sources)
        count = self.count[own].sum(0)
        mean = (self.count[own] * self.mean[own]).sum(0) / np.maximum(count, 1)
        between = (self.count[own] * (self.mean[own] - mean) ** 2).sum(0)
        return _Cells(
            count,
            mean,
            self.squares[own].sum(0) + between,
            self.low[own].min(0),
            self.high[own].max(0),
        )


def _without_own(values: Floats) -> Floats:
    """The smallest of the *other* rows [k, n], inf where there is no other."""
    others = np.full((len(values) + 1, values.shape[1]), np.inf)
    np.minimum.accumulate(values, 0, out=others[1:])
    after = np.minimum.accumulate(values[::-1], 0)[::-1]
    others[:-2] = np.minimum(others[:-2], after[1:])
    return others[:-1]
