"""A selection on disk, group by group, for reading in any order without a sort.

In go a connection and a :class:`~lever_data.relations.stream.Selection`; out comes a
:class:`Snapshot`: records of one width of its candidates in a file, and where each group begins. It
is made once in the cache (``store/cache.py``), under a key of everything it was made of: the SQL of
every relation of the connection, the runs, the reward and the filters.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lever_data.catalog import quote_identifier, quote_literal
from lever_data.errors import LeverError
from lever_data.relations.db import identity, readable_errors
from lever_data.relations.stream import (
    GROUP_KEY,
    Selection,
    conditions,
    require_columns,
    run_sql,
    union_sql,
)
from lever_data.store.cache import entry

Ids = NDArray[np.int64]
Records = NDArray[np.void]

FORMAT = 1
NO_FILE = -1
_BATCH_ROWS = 65_536
_KEYS = 1 << 18

GROUP = np.dtype(
    [
        *(("view_index", "<i4"), ("dataset", "<i4"), ("split", "<i4"), ("shot_num", "<i4")),
        *(("query_id", "<i8"), ("start", "<i8"), ("size", "<i8")),
    ]
)
_WITHIN = ("run", "candidate")


def record(columns: tuple[str, ...], width: int) -> np.dtype[np.void]:
    """The record of a candidate: ``reward``, ``behaviour`` (its log-probability in nats) and the
    selection's own columns as float64, NaN where null; its ``candidate`` number; and its
    ``pointer`` int32[width], of which the first ``length`` count."""
    width += width % 2  # whole words, or numpy reads the doubles byte by byte
    return np.dtype(
        [
            *((name, "<f8") for name in ("reward", "behaviour", *columns)),
            *(("candidate", "<i4"), ("length", "<i4"), ("pointer", "<i4", (width,))),
        ]
    )


class NoRoomError(LeverError):
    """The disk of the cache is too small for a snapshot."""


@dataclass(frozen=True)
class Snapshot:
    """Candidates group by group.

    ``groups`` [G], of dtype ``GROUP``, stand by their key: those of group g are the records
    ``start`` to ``start + size`` of the open file ``file``, of dtype ``record``. ``datasets`` and
    ``splits`` are the names that the groups number.
    """

    groups: Records
    file: int
    record: np.dtype[np.void]
    datasets: tuple[str, ...]
    splits: tuple[str, ...]

    def groups_of(self, con: duckdb.DuckDBPyConnection, queries: str | None) -> Ids:
        """The numbers of the groups of the queries of a relation; of all for ``None``."""
        if queries is None:
            return np.arange(len(self.groups))
        own = [self.groups[name] for name in ("dataset", "split", "query_id")]
        chosen = np.zeros(len(self.groups), dtype=bool)
        sql = f"select query_id from {quote_identifier(queries)} where dataset = ? and split = ?"
        for d, dataset in enumerate(self.datasets):
            for s, split in enumerate(self.splits):
                found = con.cursor().execute(sql, [dataset, split]).fetchnumpy()["query_id"]
                chosen |= (own[0] == d) & (own[1] == s) & np.isin(own[2], found)
        return np.flatnonzero(chosen)

    def order(
        self, con: duckdb.DuckDBPyConnection, groups: Ids, *, seed: int = 0, epoch: int = 0
    ) -> Ids:
        """The groups in the order of an epoch: a permutation that depends on (seed, epoch) alone,
        by a hash of their keys."""
        cursor = con.cursor()
        bound = {"datasets": list(self.datasets), "splits": list(self.splits)}
        places = [np.empty(0, np.uint64)]
        for start in range(0, len(groups), _KEYS):  # all keys at once take 80 bytes a group
            keys = self.groups[groups[start : start + _KEYS]]
            cursor.register("keys", pa.table({n: _column(keys[n]) for n in GROUP_KEY}))
            found = cursor.execute(_ORDER_SQL, bound | {"seed": seed, "epoch": epoch})
            places.append(found.fetchnumpy()["place"])
        return groups[np.argsort(np.concatenate(places), kind="stable")]

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
        LeverError: a view lacks a training column or holds no rows, the reward cannot be computed,
            or the rows that came are not those that were counted.
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
    )
    weakref.finalize(snapshot, os.close, file)
    return snapshot


def _make(con: duckdb.DuckDBPyConnection, selection: Selection, folder: Path) -> None:
    source = Source.of(con, selection)
    require_room(folder, source.count * record(selection.columns, source.width).itemsize)

    def read(reader: pa.RecordBatchReader) -> Records | None:
        with (folder / "rows").open("wb") as file:
            width = source.width
            return whole_groups(reader, lambda b: records(b, selection, width).tofile(file))

    np.save(folder / "groups.npy", source.groups(con, read))
    layout = {"columns": selection.columns, "width": source.width}
    layout |= {"datasets": source.levels["dataset"], "splits": source.levels["split"]}
    (folder / "layout.json").write_text(json.dumps(layout))


@dataclass(frozen=True)
class Source:
    """Where the rows of a selection come from: SQL that begins with ``from`` and its parameters,
    and what a first look found there."""

    selection: Selection
    sql: str
    bound: dict[str, object]
    count: int
    width: int  # of the longest pointer
    levels: dict[str, list[str]]  # the values of dataset, split and run

    @classmethod
    def of(cls, con: duckdb.DuckDBPyConnection, selection: Selection) -> Source:
        """Look at the selection once.

        Raises:
            LeverError: it holds no rows.
        """
        failed, other_source, fallback = conditions(selection)
        sql = union_sql(con, selection, limited=False)
        sql = f"from ({sql}) where not ({failed}) and not ({other_source}) and not ({fallback})"
        bound: dict[str, object] = {"methods": list(selection.gen_methods)}
        count, width, *names = run_sql(con.cursor(), _COUNT_SQL + sql, bound).fetchall()[0]
        if not count:
            raise LeverError("the view holds no rows", where=", ".join(selection.views))
        levels = dict(zip(("dataset", "split", "run"), names, strict=True))
        return cls(selection, sql, bound, count, width, levels)

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
        for order in ("", f" order by {', '.join((*GROUP_KEY, *_WITHIN))}"):
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
    select
        count(*),
        coalesce(max(len(pointer)), 0),
        list_sort(list(distinct dataset)),
        list_sort(list(distinct split)),
        list_sort(list(distinct run))
    """


def _keys_sql(levels: dict[str, list[str]]) -> str:
    """The columns that :func:`whole_groups` reads, texts as enums in their order."""
    texts = [
        f"{name}::enum({', '.join(map(quote_literal, values))}) as {name}"
        for name, values in levels.items()
    ]
    return ", ".join([*texts, "view_index", "query_id", "shot_num", "candidate"])


def _values_sql(selection: Selection) -> str:
    """What a record holds beside its candidate number."""
    own = [f"{quote_identifier(c)}::double as {quote_identifier(c)}" for c in selection.columns]
    reward = "coalesce(raw_reward, 0)::double as reward"
    return ", ".join(["pointer", reward, "logprob_score as behaviour", *own])


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


def whole_groups(
    reader: pa.RecordBatchReader, take: Callable[[pa.RecordBatch], object]
) -> Records | None:
    """Hand every batch on; returns the groups by key, ``None`` where rows do not stand together."""
    parts = []
    last: dict[str, Any] = {}
    before = 0
    for batch in reader:
        if not batch.num_rows:
            continue
        keys = {name: _numbers(batch.column(name), name) for name in (*GROUP_KEY, *_WITHIN)}
        begins = _begins(keys, last)
        if begins is None:
            return None
        starts = np.flatnonzero(begins)
        found = np.empty(len(starts), GROUP)
        for name in GROUP_KEY:
            found[name] = keys[name][starts]
        found["start"] = starts + before
        parts.append(found)
        last = {name: values[-1] for name, values in keys.items()}
        before += batch.num_rows
        take(batch)
    groups = np.concatenate(parts) if parts else np.empty(0, GROUP)
    groups["size"] = np.diff(groups["start"], append=before)
    groups = groups[np.lexsort([groups[name] for name in reversed(GROUP_KEY)])]
    sorted_keys = groups[list(GROUP_KEY)]
    return None if (sorted_keys[1:] == sorted_keys[:-1]).any() else groups


def _begins(keys: dict[str, NDArray[Any]], last: dict[str, Any]) -> NDArray[np.bool_] | None:
    """Which rows begin a group; ``None`` where rows of one are not in the order of (run,
    candidate)."""
    change = np.zeros(len(keys["run"]), dtype=bool)
    change[0] = not last
    before = {n: np.insert(v[:-1], 0, last.get(n, v[0])) for n, v in keys.items()}
    for name in GROUP_KEY:
        change |= keys[name] != before[name]
    run, candidate = keys["run"], keys["candidate"]
    later = (run > before["run"]) | ((run == before["run"]) & (candidate >= before["candidate"]))
    return change if (change | later).all() else None


def _column(values: NDArray[Any]) -> pa.Array:
    """Integers as an Arrow array; ``pa.array`` would import pandas where it is installed: 0.5 s."""
    kind, buffer = pa.from_numpy_dtype(values.dtype), pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [None, buffer])


def _numbers(column: pa.Array, name: str) -> Ids:
    if column.null_count:
        raise LeverError(
            f"rows of the view lack a {name}", hint="leave them out in its SQL", value=None
        )
    if pa.types.is_dictionary(column.type):
        column = column.indices
    numbers: Ids = column.to_numpy().astype(np.int64)
    return numbers


def records(batch: pa.RecordBatch, selection: Selection, width: int) -> Records:
    """The rows of a batch as records."""
    found = np.zeros(batch.num_rows, record(selection.columns, width))
    for name in ("reward", "behaviour", *selection.columns):
        found[name] = batch.column(name).to_numpy(zero_copy_only=False)
    found["candidate"] = batch.column("candidate").to_numpy()
    pointers = batch.column("pointer")
    lengths = pointers.value_lengths().to_numpy(zero_copy_only=False)
    found["length"] = lengths
    values = pointers.flatten().to_numpy(zero_copy_only=False)
    steps = np.arange(found.dtype["pointer"].shape[0]) < lengths[:, None]
    found["pointer"][steps] = values
    return found
