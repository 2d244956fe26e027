"""A selection on disk, group by group, for reading in any order without a sort.

In go a connection and a :class:`~lever_data.relations.stream.Selection`; out comes a
:class:`Snapshot`: records of one width of its candidates in a file, where each group begins, and
what the filters left out. It is made once in the cache (``store/cache.py``), under a key of
everything it was made of: the SQL of every relation of the connection, the runs, the reward and the
filters.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lever_data.catalog import quote_identifier
from lever_data.errors import LeverError
from lever_data.relations.db import identity
from lever_data.relations.records import (
    GROUP_KEY,
    Ids,
    Records,
    as_bytes,
    integers,
    record,
    records,
    save_array,
    whole_groups,
)
from lever_data.relations.stream import Selection, Source, require_columns, union_sql
from lever_data.store.cache import entry

FORMAT = 2
NO_FILE = -1
_KEYS = 1 << 16  # keys looked at once
LARGE = 1 << 33  # bytes of candidates beyond which an order is coarser, on any machine alike
STRETCH = 1 << 15  # candidates of neighbours, which mostly stand together: a megabyte
TOGETHER = 128  # stretches whose groups are shuffled together
_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of this machine
_WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", 0)
_ASKED = 1 << 18  # bytes asked for at once: the system caps it, many at 1 MB
_NEAR = 1 << 17  # bytes between groups that are read along with them


class NoRoomError(LeverError):
    """The disk of the cache is too small for a snapshot."""


@dataclass(frozen=True)
class Snapshot:
    """Candidates group by group.

    ``groups`` [G], of dtype ``GROUP``, stand by their key: those of group g are the records
    ``start`` to ``start + size`` of the open file ``file``, of dtype ``record``; ``nulls`` of them
    have no reward. ``datasets`` and ``splits`` are the names that the groups number. Besides:
    ``dropped``, of dtype ``DROPPED``, the models that answered, and how many candidates name none.
    """

    groups: Records
    file: int
    record: np.dtype[np.void]
    datasets: tuple[str, ...]
    splits: tuple[str, ...]
    dropped: Records
    scorers: tuple[str, ...]
    unscored: int

    def groups_of(self, con: duckdb.DuckDBPyConnection, queries: str | None) -> Ids:
        """The numbers of the groups of the queries of a relation; of all for ``None``."""
        return np.flatnonzero(self.is_of(con, queries, self.groups))

    def is_of(
        self, con: duckdb.DuckDBPyConnection, queries: str | None, keys: Records
    ) -> NDArray[np.bool_]:
        """Which of the keys, groups or others, are of the queries of a relation."""
        chosen = np.full(len(keys), queries is None)
        if queries is None:
            return chosen
        sql = f"select query_id from {quote_identifier(queries)} where dataset = ? and split = ?"
        for d, dataset in enumerate(self.datasets):
            for s, split in enumerate(self.splits):
                found = con.cursor().execute(sql, [dataset, split]).fetchnumpy()["query_id"]
                found.sort()
                for start in range(0, len(keys) if len(found) else 0, _KEYS):
                    part = keys[start : start + _KEYS]
                    place = np.searchsorted(found, part["query_id"]).clip(max=len(found) - 1)
                    here = (part["dataset"] == d) & (part["split"] == s)
                    chosen[start : start + _KEYS] |= here & (found[place] == part["query_id"])
        return chosen

    def order(
        self, con: duckdb.DuckDBPyConnection, groups: Ids, *, seed: int = 0, epoch: int = 0
    ) -> Ids:
        """The groups in the order of an epoch: a permutation that depends on (seed, epoch) alone,
        by a hash of their keys, and not on how they lie in the file.

        Where :meth:`shuffle` says so it is shuffled in two levels: stretches, neighbours by key, in
        the order in which the hash comes upon them, so many of them at a time, and within these the
        groups by their hash.

        Args:
            groups: ascending.
        """
        cursor = con.cursor()
        bound = {"datasets": list(self.datasets), "splits": list(self.splits)}
        places = np.empty(len(groups), np.uint64)
        for start in range(0, len(groups), _KEYS):  # all keys at once take 80 bytes a group
            keys = self.groups[groups[start : start + _KEYS]]
            cursor.register("keys", pa.table({n: integers(keys[n]) for n in GROUP_KEY}))
            found = cursor.execute(_ORDER_SQL, bound | {"seed": seed, "epoch": epoch})
            places[start : start + _KEYS] = found.fetchnumpy()["place"]
        stretches = self._stretches(groups)
        if stretches is None or not len(groups):
            return groups[np.argsort(places, kind="stable")]
        return groups[_in_windows(places, *stretches)]

    def shuffle(self, rows: int) -> str | None:
        """Among what the groups of so many candidates are shuffled; ``None``: all of them."""
        if rows * self.record.itemsize <= LARGE:
            return None
        return f"{TOGETHER} stretches of {STRETCH:,} candidates at a time"

    def _stretches(self, groups: Ids) -> tuple[NDArray[Any], int] | None:
        """The number of each group's stretch, ascending, and how many are shuffled together;
        ``None`` where all groups are."""
        if self.shuffle(int(self.groups["size"].sum())) is None:
            return None
        stretch, rows = np.empty(len(groups), np.uint32), 0
        for start in range(0, len(groups), _KEYS):
            size = self.groups["size"][groups[start : start + _KEYS]].astype(np.int64)
            begins = rows + np.cumsum(size) - size
            stretch[start : start + _KEYS] = begins // STRETCH
            rows += int(size.sum())
        return None if self.shuffle(rows) is None else (stretch, TOGETHER)

    def ahead(self, groups: Ids) -> None:
        """Let the system read the records of these groups, soon to be read, from the disk: all that
        stand near each other at once. Nothing where the memory holds the file anyway."""
        if self.file == NO_FILE or not hasattr(os, "posix_fadvise"):
            return
        if os.fstat(self.file).st_size <= _MEMORY // 2 or not len(groups):
            return
        size = self.record.itemsize
        found = self.groups[groups]
        found = found[np.argsort(found["start"])]
        first, end = found["start"] * size, (found["start"] + found["size"]) * size
        apart = np.flatnonzero(first[1:] - end[:-1] > _NEAR)
        first, end = first[np.append(0, apart + 1)], end[np.append(apart, -1)]
        for begin, close in zip(first.tolist(), end.tolist(), strict=True):
            for offset in range(begin, close, _ASKED):
                os.posix_fadvise(self.file, offset, min(_ASKED, close - offset), _WILL_NEED)

    def read(self, groups: Ids) -> Records:
        """The records of these groups, one group after the other.

        They are read and not mapped: 12 million candidates a second of processor time in groups
        of 15 at random, against 18, but no page of the file counts as memory of the process.

        Raises:
            LeverError: the file is shorter than it was.
        """
        found = self.groups[groups]
        first, end = found["start"], found["start"] + found["size"]
        opens, closes = np.ones((2, len(found)), dtype=bool)  # neighbours are read at once
        opens[1:] = first[1:] != end[:-1]
        closes[:-1] = opens[1:]
        first, last = first[opens], end[closes]
        size = self.record.itemsize
        lengths, offsets = ((last - first) * size).tolist(), (first * size).tolist()
        data = b"".join(map(os.pread, repeat(self.file), lengths, offsets))
        if len(data) != sum(lengths):
            raise LeverError(
                "the snapshot in the cache was cut while it was read",
                value=f"{len(data):,} of {sum(lengths):,} bytes",
                hint="start the command again: it is made anew",
            )
        return np.frombuffer(data, self.record)


def _in_windows(places: NDArray[np.uint64], stretch: NDArray[Any], together: int) -> Ids:
    """An order of groups [G] of whose ``places`` those of ``together`` stretches are sorted at a
    time: stretches come as the least of their places does.

    Args:
        stretch: of each group, ascending.
    """
    begins = np.flatnonzero(np.append(True, stretch[1:] != stretch[:-1]))
    ends = np.append(begins[1:], len(places))
    met = np.argsort(np.minimum.reduceat(places, begins), kind="stable")
    order, end = np.empty(len(places), np.int64), 0
    for first in range(0, len(met), together):
        window = np.sort(met[first : first + together])
        groups = np.concatenate([np.arange(begins[n], ends[n]) for n in window])
        start, end = end, end + len(groups)
        order[start:end] = groups[np.argsort(places[groups], kind="stable")]
    return order


_ORDER_SQL = """
    select
        hash(
            view_index::integer,
            ($datasets::varchar[])[dataset + 1],
            ($splits::varchar[])[split + 1],
            query_id::bigint,
            shot_num::tinyint,
            $seed::bigint,
            $epoch::bigint
        ) as place
    from keys
"""


def open_snapshot(
    con: duckdb.DuckDBPyConnection, selection: Selection, known: str | None = None
) -> Snapshot:
    """The snapshot of a selection, of all its queries; made where the cache has none.

    Args:
        con: from ``lever_data.connect``.
        known: the :func:`identity` of the connection, where it was taken before further relations
            were defined that the selection does not read.

    Raises:
        LeverError: a view lacks a training column or holds no rows, before any filter, the reward
            cannot be computed, or the rows that came are not those that were counted.
        NoRoomError: there is no room; :mod:`lever_data.relations.blocks` reads without.
    """
    require_columns(con, selection)
    with entry(key_of(con, selection, known), lambda to: _make(con, selection, to)) as folder:
        return _opened(folder)


def key_of(
    con: duckdb.DuckDBPyConnection, selection: Selection, known: str | None, *further: str
) -> str:
    """A digest of all that the rows of a selection are made of, and of further words."""
    sql = union_sql(con, selection, limited=False)
    made_of = [FORMAT, known or identity(con), sql, selection.gen_methods, selection.skip_fallback]
    made_of += further
    return hashlib.sha256(repr(made_of).encode()).hexdigest()


def _opened(folder: Path) -> Snapshot:
    layout = json.loads((folder / "layout.json").read_text())
    file = os.open(folder / "rows", os.O_RDONLY)
    snapshot = Snapshot(
        np.load(folder / "groups.npy", mmap_mode="r"),
        file,
        record(tuple(layout["columns"]), layout["width"]),
        tuple(layout["datasets"]),
        tuple(layout["splits"]),
        np.load(folder / "dropped.npy", mmap_mode="r"),
        tuple(layout["scorers"]),
        layout["unscored"],
    )
    weakref.finalize(snapshot, os.close, file)
    return snapshot


def _make(con: duckdb.DuckDBPyConnection, selection: Selection, folder: Path) -> None:
    source = Source.of(con, selection)
    require_room(folder, source.count * record(selection.columns, source.width).itemsize)

    def read(reader: pa.RecordBatchReader) -> Records | None:
        with (folder / "rows").open("wb") as file:
            columns, width = selection.columns, source.width
            return whole_groups(reader, lambda b: file.write(as_bytes(records(b, columns, width))))

    save_array(folder / "groups.npy", source.groups(con, read))
    save_array(folder / "dropped.npy", source.dropped(con))
    layout = {"columns": selection.columns, "width": source.width, "unscored": source.unscored}
    layout |= {f"{name}s": source.levels[name] for name in ("dataset", "split", "scorer")}
    (folder / "layout.json").write_text(json.dumps(layout))


def require_room(folder: Path, size: int) -> None:
    """Refuse to write so many bytes where they do not fit."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise NoRoomError(
            f"what training reads takes {size / 1e9:.1f} GB on disk, and {free / 1e9:.1f} GB are "
            "free",
            where=str(folder.parent),
            hint="make room there, or name another folder: LEVER_CACHE=DIR",
        )
