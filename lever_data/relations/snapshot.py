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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lever_data.catalog import enum_sql, quote_identifier
from lever_data.errors import LeverError
from lever_data.relations.db import identity, readable_errors
from lever_data.relations.records import (
    DROPPED,
    WITHIN,
    Ids,
    Records,
    as_bytes,
    integers,
    numbers,
    record,
    records,
    save_array,
    whole_groups,
)
from lever_data.relations.stream import (
    GROUP_KEY,
    Selection,
    conditions,
    require_columns,
    run_sql,
    union_sql,
)
from lever_data.store.cache import entry

FORMAT = 2
NO_FILE = -1
_BATCH_ROWS = 65_536
_KEYS = 1 << 16  # keys looked at once
_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of this machine
_WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", 0)
_NAN = "'nan'::double"
_TEXTS = ("dataset", "split", "run")  # as numbers, in the order of their names


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
        by a hash of their keys."""
        cursor = con.cursor()
        bound = {"datasets": list(self.datasets), "splits": list(self.splits)}
        places = np.empty(len(groups), np.uint64)
        for start in range(0, len(groups), _KEYS):  # all keys at once take 80 bytes a group
            keys = self.groups[groups[start : start + _KEYS]]
            cursor.register("keys", pa.table({n: integers(keys[n]) for n in GROUP_KEY}))
            found = cursor.execute(_ORDER_SQL, bound | {"seed": seed, "epoch": epoch})
            places[start : start + _KEYS] = found.fetchnumpy()["place"]
        order = np.argsort(places, kind="stable")
        del places
        return groups[order]

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
        if os.fstat(self.file).st_size > _MEMORY // 2 and hasattr(os, "posix_fadvise"):
            # the disk looks for all of them at once: six times as many a second
            asked = map(
                os.posix_fadvise, *(repeat(self.file), offsets, lengths, repeat(_WILL_NEED))
            )
            deque(asked, maxlen=0)
        data = b"".join(map(os.pread, repeat(self.file), lengths, offsets))
        if len(data) != sum(lengths):
            raise LeverError(
                "the snapshot in the cache was cut while it was read",
                value=f"{len(data):,} of {sum(lengths):,} bytes",
                hint="start the command again: it is made anew",
            )
        return np.frombuffer(data, self.record)


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


@dataclass(frozen=True)
class Source:
    """Where the rows of a selection come from: SQL that begins with ``from`` and its parameters,
    and what a first look found there."""

    selection: Selection
    sql: str
    left_out: str  # as ``sql``, of the rows that the filters leave out
    bound: dict[str, object]
    count: int
    total: int  # with those left out
    width: int  # of the longest pointer
    unscored: int  # candidates of which no model is known
    levels: dict[str, list[str]]  # the values of dataset, split, run and scorer

    @classmethod
    def of(cls, con: duckdb.DuckDBPyConnection, selection: Selection) -> Source:
        """Look at the selection once.

        Raises:
            LeverError: its views hold no rows.
        """
        failed, other_source, fallback = conditions(selection)
        keep = f"not ({failed}) and not ({other_source}) and not ({fallback})"
        rows = f"from ({union_sql(con, selection, limited=False)})"
        bound: dict[str, object] = {"methods": list(selection.gen_methods)}
        sql = f"select {_COUNT_SQL.format(keep=keep)} {rows}"
        total, *found = run_sql(con.cursor(), sql, bound).fetchall()[0]
        if not total:
            raise LeverError("the view holds no rows", where=", ".join(selection.views))
        count, width, unscored, *names = found
        levels = dict(zip((*_TEXTS, "scorer"), names, strict=True))
        reason = f"case when {failed} then 0 when {other_source} then 1 else 2 end as reason"
        left_out = f"from (select *, {reason} {rows} where not ({keep}))"
        sql = f"{rows} where {keep}"
        return cls(selection, sql, left_out, bound, count, total, width, unscored, levels)

    def groups(
        self,
        con: duckdb.DuckDBPyConnection,
        read: Callable[[pa.RecordBatchReader], Records | None],
        *,
        with_values: bool = True,
    ) -> Records:
        """What ``read`` finds in the rows: their groups, ``None`` where they stand apart.

        Args:
            with_values: whether the rows are whole, or keys alone.

        Raises:
            LeverError: there are more or fewer rows than were counted.
        """
        columns = _keys_sql(self.levels)
        if with_values:
            columns += ", " + _values_sql(self.selection)
        # a view over runs whose queries stand together gives whole groups as it stands, in a fifth
        # of the time of a sort
        for order in ("", f" order by {', '.join((*GROUP_KEY, *WITHIN))}"):
            with readable_errors():
                cursor = con.cursor()  # kept alive: on some versions the reader needs it
                rows = cursor.sql(f"select {columns} {self.sql}{order}", params=self.bound)
                groups = read(rows.to_arrow_reader(_BATCH_ROWS))
            if groups is not None:
                break
        found = 0 if groups is None else int(groups["size"].sum())
        if groups is None or found != self.count:
            raise self.changed(f"{found:,} of {self.count:,}")
        return groups

    def dropped(self, con: duckdb.DuckDBPyConnection) -> Records:
        """What the filters leave out, of dtype ``DROPPED``: neighbours of a query and a reason
        together; rows of no query are nobody's."""
        parts = bytearray()
        names = ("dataset", "split", "query_id", "reason")
        if self.count == self.total:
            return np.empty(0, DROPPED)
        known = " and ".join(f"{name} is not null" for name in names)
        columns = f"{_texts_sql(self.levels)}, query_id, reason"
        with readable_errors():
            cursor = con.cursor()  # kept alive: on some versions the reader needs it
            rows = cursor.sql(f"select {columns} {self.left_out} where {known}", params=self.bound)
            for batch in rows.to_arrow_reader(_BATCH_ROWS):
                keys = {name: numbers(batch.column(name), name) for name in names}
                change = np.ones(batch.num_rows, dtype=bool)
                change[1:] = np.any([k[1:] != k[:-1] for k in keys.values()], axis=0)
                starts = np.flatnonzero(change)
                found = np.empty(len(starts), DROPPED)
                for name, values in keys.items():
                    found[name] = values[starts]
                found["count"] = np.diff(starts, append=batch.num_rows)
                parts += found.tobytes()
        return np.frombuffer(parts, DROPPED)

    def changed(self, value: str) -> LeverError:
        """Say that the rows are not those of before."""
        return LeverError(
            "reading the view twice gave other rows; the store changed, or its SQL is not the same "
            "every time",
            where=", ".join(self.selection.views),
            value=value,
            hint="start the command again",
        )


_COUNT_SQL = """
    count(*),
    count(*) filter ({keep}),
    coalesce(max(len(pointer)) filter ({keep}), 0),
    count(*) filter ({keep} and scorer is null),
    coalesce(list_sort(list(distinct dataset) filter (dataset is not null)), []),
    coalesce(list_sort(list(distinct split) filter (split is not null)), []),
    coalesce(list_sort(list(distinct run) filter (run is not null)), []),
    coalesce(list_sort(list(distinct scorer) filter ({keep} and scorer is not null)), [])
    """


def _keys_sql(levels: dict[str, list[str]]) -> str:
    """The columns that :func:`whole_groups` reads."""
    keys = ("view_index", "query_id", "shot_num", "candidate")
    return ", ".join([_texts_sql(levels), *keys, "(raw_reward is null)::tinyint as lacks"])


def _texts_sql(levels: dict[str, list[str]]) -> str:
    """Columns of text as enums, whose numbers are the places of their names."""
    return ", ".join(f"{name}::{enum_sql(levels[name])} as {name}" for name in _TEXTS)


def _values_sql(selection: Selection) -> str:
    """What a record holds beside its candidate number; NaN for null."""
    reward = "coalesce(raw_reward, 0)::double as reward"
    behaviour = f"coalesce(logprob_score, {_NAN}) as behaviour"
    own = [
        f"coalesce({c}::double, {_NAN}) as {c}" for c in map(quote_identifier, selection.columns)
    ]
    return ", ".join(["pointer", reward, behaviour, *own])


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
