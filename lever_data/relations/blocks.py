"""A selection too large for the disk of the cache, in a coarser order: block by block.

In go a connection and a :class:`~lever_data.relations.stream.Selection`; out comes a snapshot whose
groups alone lie in the cache. Its candidates are read from the views, some half a million at a time
(the neighbours of a stretch of queries, so that Parquet reads their row groups and no others), and
the order of an epoch is shuffled in two levels: which blocks come together, and their groups.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lever_data.relations.records import (
    GROUP_KEY,
    Ids,
    Records,
    record,
    records,
    save_array,
    whole_groups,
)
from lever_data.relations.snapshot import NO_FILE, Snapshot, key_of, require_room
from lever_data.relations.stream import Selection, Source, require_columns
from lever_data.store.cache import entry

BLOCK_ROWS = 1 << 19  # candidates, 17 MB of two shots
WINDOW = 8  # blocks whose groups are shuffled together, and held in memory
_PLACE = GROUP_KEY[:3]  # within it groups stand by query


@dataclass(frozen=True)
class Blocks(Snapshot):
    """Groups as in a :class:`Snapshot`, numbered and ``start`` counted by key; ``block`` [G] is the
    block of each, ascending."""

    source: Source
    con: duckdb.DuckDBPyConnection
    block: Ids
    _held: OrderedDict[int, Records] = field(default_factory=OrderedDict)

    def shuffle(self, rows: int) -> str:
        """Among what the groups are shuffled, however few candidates they hold."""
        return f"{WINDOW} blocks of {BLOCK_ROWS:,} candidates at a time"

    def _stretches(self, groups: Ids) -> tuple[NDArray[Any], int]:
        """The blocks are the stretches, as that many can be held."""
        return self.block[groups], WINDOW

    def read(self, groups: Ids) -> Records:
        """The records of these groups, one group after the other.

        Raises:
            LeverError: the view gives other rows than before.
        """
        block, found = self.block[groups], self.groups[groups]
        goes = np.cumsum(found["size"]) - found["size"]
        rows = np.empty(int(found["size"].sum()), self.record)
        for number in sorted(set(block.tolist()), key=lambda n: n not in self._held):
            own, held = block == number, self._rows(number)
            size = found["size"][own]
            begin = found["start"][own] - self.groups["start"][np.searchsorted(self.block, number)]
            rows[_one_after_the_other(goes[own], size)] = held[_one_after_the_other(begin, size)]
        return rows

    def _rows(self, number: int) -> Records:
        """The candidates of a block; those of the blocks used last are held."""
        if number not in self._held:
            while len(self._held) >= WINDOW:
                self._held.popitem(last=False)
            self._held[number] = self._read_block(number)
        self._held.move_to_end(number)
        return self._held[number]

    def _read_block(self, number: int) -> Records:
        wanted = self.groups[slice(*np.searchsorted(self.block, (number, number + 1)))]
        first, last = wanted[0], wanted[-1]
        bound: dict[str, object] = {
            "view": int(first["view_index"]),
            "dataset": self.datasets[first["dataset"]],
            "split": self.splits[first["split"]],
            "low": int(first["query_id"]),
            "high": int(last["query_id"]),
        }
        size = int(wanted["size"].sum())
        part = replace(
            self.source,
            sql=self.source.sql + _OF_A_BLOCK,
            bound=self.source.bound | bound,
            count=size,
        )
        parts: list[Records] = []

        def read(reader: pa.RecordBatchReader) -> Records | None:
            parts.clear()
            columns, width = part.selection.columns, part.width
            return whole_groups(reader, lambda b: parts.append(records(b, columns, width)))

        found = part.groups(self.con, read)
        names = [*GROUP_KEY, "size"]
        if not np.array_equal(found[names], wanted[names]):
            raise part.changed(f"queries {bound['low']} to {bound['high']}")
        return np.concatenate(parts)[_one_after_the_other(found["start"], found["size"])]


_OF_A_BLOCK = (
    " and view_index = $view and dataset = $dataset and split = $split"
    " and query_id between $low and $high"
)


def open_blocks(
    con: duckdb.DuckDBPyConnection, selection: Selection, known: str | None = None
) -> Blocks:
    """The groups of a selection, its candidates to be read from the views.

    Args:
        con: from ``lever_data.connect``; candidates are read through it.
        known: as in :func:`~lever_data.relations.snapshot.open_snapshot`.

    Raises:
        LeverError: as there; and there is no room for the groups, 32 bytes each.
    """
    require_columns(con, selection)
    source = Source.of(con, selection)

    def make(folder: Path) -> None:
        def read(reader: pa.RecordBatchReader) -> Records | None:
            return whole_groups(reader, lambda batch: None)

        groups = source.groups(con, read, with_values=False)
        groups["start"] = np.cumsum(groups["size"]) - groups["size"]
        require_room(folder, groups.nbytes)
        save_array(folder / "groups.npy", groups)
        save_array(folder / "dropped.npy", source.dropped(con))

    with entry(key_of(con, selection, known, "blocks"), make) as folder:
        groups = np.load(folder / "groups.npy", mmap_mode="r")
        dropped = np.load(folder / "dropped.npy", mmap_mode="r")
    return Blocks(
        groups,
        NO_FILE,
        record(selection.columns, source.width),
        tuple(source.levels["dataset"]),
        tuple(source.levels["split"]),
        dropped,
        tuple(source.levels["scorer"]),
        source.unscored,
        source,
        con,
        _blocks(groups),
    )


def _blocks(groups: Records) -> Ids:
    """The block [G] of each group; those of a query are in one, and a block is of one place."""
    start, place = groups["start"], np.stack([groups[name] for name in _PLACE])
    moved = np.ones(len(groups), dtype=bool)
    moved[1:] = (place[:, 1:] != place[:, :-1]).any(0)
    begins = moved.copy()
    begins[1:] |= groups["query_id"][1:] != groups["query_id"][:-1]
    stretch = np.maximum.accumulate(np.where(begins, start, 0)) // BLOCK_ROWS
    moved[1:] |= stretch[1:] != stretch[:-1]
    return np.cumsum(moved) - 1


def _one_after_the_other(start: Ids, size: Ids) -> Ids:
    """Where the rows of groups stand that begin at ``start`` [G] and have ``size`` [G] rows."""
    return np.repeat(start - (np.cumsum(size) - size), size) + np.arange(size.sum())
