"""Which examples a query may be shown: its own pool, or one that all queries share.

In go query ids; out come the ids of their candidates. Three sources: an [n, K] file (row = query
id), the pools stored with the queries, or the sorted union of all ids in any pointer of the
selected runs, taken before view and filters so that ablations share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lever_data.errors import LeverError, UsageError, reason
from lever_data.readers.vectors import map_npy
from lever_data.relations.db import quote_identifier
from lever_data.relations.records import save_array
from lever_data.store.cache import entry

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class SharedPool:
    """One pool for all: ``ids`` [K] int64, ascending."""

    ids: Ids

    def describe(self) -> str:
        """For people and the provenance."""
        return f"one shared pool of {len(self.ids):,}"

    def sha256(self) -> str:
        """Hex digest of the ids."""
        return _sha256(self.ids)

    def last_id(self) -> int:
        """The largest example id; -1 without any."""
        return int(self.ids.max(initial=-1))


@dataclass(frozen=True)
class FilePool:
    """A file of candidate ids [n, K], row = query id."""

    path: str
    table: NDArray[np.integer]

    def of(self, query_ids: Ids) -> Ids:
        """Candidate ids [B, K] of the queries.

        Raises:
            LeverError: the file has no row for a query.
        """
        if len(query_ids):
            self.require_row(int(query_ids.max()))
        return self.table[query_ids].astype(np.int64)

    @property
    def rows(self) -> int:
        """n, the number of queries that have a pool."""
        return len(self.table)

    def require_row(self, query: int) -> None:
        """Refuse a query that has no row; ``LeverError`` names it."""
        if query >= self.rows:
            raise LeverError(
                f"the pool file {self.path} has {self.rows:,} rows, none for a query",
                where=f"query {query}",
                hint="give the pools of this split; row = index of the question in it",
            )

    def last_id(self) -> int:
        """The largest example id."""
        return int(self.table.max())

    def describe(self) -> str:
        """For people and the provenance."""
        return f"{self.path}: {self.table.shape[1]} candidates per query"

    def sha256(self) -> str:
        """Hex digest of the ids, row by row, as the file holds them."""
        return _sha256(self.table)


@dataclass(frozen=True)
class StoredPool:
    """The pools stored with the queries: ``flat[offsets[i]:offsets[i + 1]]`` of ``queries[i]``."""

    queries: Ids  # ascending
    offsets: Ids
    flat: NDArray[np.int32]

    def of(self, query_ids: Ids) -> Ids:
        """Candidate ids [B, K], padded with -1 to the longest.

        Raises:
            LeverError: a query has no pool in the store.
        """
        at = np.searchsorted(self.queries, query_ids).clip(max=len(self.queries) - 1)
        missing = self.queries[at] != query_ids
        if missing.any():
            raise LeverError(
                "a query has no candidate pool in the store",
                where=f"query {query_ids[missing][0]}",
                hint="--pool FILE.npy gives every query one",
            )
        sizes = self.offsets[at + 1] - self.offsets[at]
        column = np.arange(sizes.max(initial=1))
        inside = column < sizes[:, None]
        source = np.where(inside, self.offsets[at][:, None] + column, 0)
        return np.where(inside, self.flat[source], -1).astype(np.int64)

    def describe(self) -> str:
        """For people and the provenance."""
        return f"the pools stored with {len(self.queries):,} queries"

    def sha256(self) -> str:
        """Hex digest of the queries and the ids of each."""
        return _sha256(self.queries, self.offsets, self.flat)

    def last_id(self) -> int:
        """The largest example id; -1 without any."""
        return int(self.flat.max(initial=-1))


PoolSource = SharedPool | FilePool | StoredPool


def open_pools(
    con: duckdb.DuckDBPyConnection,
    path: Path | None,
    base: str,
    *places: tuple[str, str],
    known: str | None = None,
) -> PoolSource:
    """The pools of the queries of a place.

    Args:
        con: from ``lever_data.connect``.
        path: a ``.npy`` file [n, K] of example ids; ``None``: the store decides.
        base: relation with dataset, split and a pointer per candidate of the selected runs,
            before any filter.
        places: (dataset, split) of the queries; query ids of another mean other questions.
        known: a digest of the runs and the SQL of ``base``, by which the cache keeps the pools.
    """
    if path is not None:
        return _from_file(path)
    if known is None:
        return _from_store(con, base, places)

    def make(folder: Path) -> None:
        for name, array in vars(_from_store(con, base, places)).items():
            save_array(folder / f"{name}.npy", array)

    with entry(hashlib.sha256(repr(["pools", known, places]).encode()).hexdigest(), make) as folder:
        # mapped for writing, which torch wants, but nothing is written back
        found = {file.stem: np.load(file, mmap_mode="c") for file in folder.glob("*.npy")}
    return SharedPool(**found) if "ids" in found else StoredPool(**found)


def _from_store(
    con: duckdb.DuckDBPyConnection, base: str, places: Sequence[tuple[str, str]]
) -> PoolSource:
    here = " or ".join("(dataset = ? and split = ?)" for _ in places)
    bound = [name for place in places for name in place]
    total, pooled, lacking, twice = 0, 0, None, None
    # most stores hold none, and `queries` compares the runs of every query: 120 MB at 1.3 million
    any_pool = f"select count(candidate_pool) from stg_queries where {here}"
    if con.cursor().execute(any_pool, bound).fetchall()[0][0]:
        counts = con.cursor().execute(
            "select count(*), count(candidate_pool), "
            "min(query_id) filter (candidate_pool is null), "
            "min(query_id) filter (len(list_distinct(candidate_pool)) < len(candidate_pool)) "
            f"from queries where {here}",
            bound,
        )
        total, pooled, lacking, twice = counts.fetchall()[0]
    if pooled == 0:
        sql = f"select distinct unnest(pointer)::bigint as id from {quote_identifier(base)} "
        found = con.cursor().execute(f"{sql} where {here} order by id", bound).fetchnumpy()["id"]
        return SharedPool(np.ascontiguousarray(found, dtype=np.int64))
    if pooled < total:
        raise LeverError(
            f"{pooled:,} of {total:,} queries have a candidate pool of their own, the others none",
            where=f"query {lacking}",
            hint="--pool FILE.npy gives every query one, --run chooses runs that agree",
        )
    if twice is not None:
        raise LeverError("a candidate pool holds an example twice", where=f"query {twice}")
    cursor = con.cursor()  # kept alive: on some versions the reader needs it
    sql = f"select query_id, candidate_pool from queries where {here} order by query_id"
    return _stored(cast(pa.Table, cursor.sql(sql, params=bound).to_arrow_table()))


def _from_file(path: Path) -> FilePool:
    try:
        table = map_npy(path)
    except FileNotFoundError:
        raise UsageError("there is no such pool file", value=str(path)) from None
    except (OSError, ValueError) as error:
        raise LeverError(
            f"the pool file cannot be read ({reason(error)})", where=str(path)
        ) from None
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer) or 0 in table.shape:
        raise LeverError(
            "a pool file holds one array [n, K] of candidate ids",
            where=str(path),
            value=f"{table.dtype} {list(table.shape)}",
        )
    if (least := int(table.min())) < -1:
        raise LeverError(
            "a pool file holds ids from 0 on, and -1 where a pool is shorter",
            where=str(path),
            value=least,
        )
    for start in range(0, len(table), 4096):  # at once a sorted copy would hold the whole file
        rows = np.sort(table[start : start + 4096], axis=1)
        twice = (rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)
        if twice.any():
            row, column = (int(i) for i in np.argwhere(twice)[0])
            raise LeverError(
                "a pool names an example twice, so that it could be shown twice",
                where=f"{path}, query {start + row}",
                value=int(rows[row, column]),
            )
    return FilePool(path.name, table)


def _stored(table: pa.Table) -> StoredPool:
    queries = table.column(0).to_numpy()
    if len(queries) > 1 and not (np.diff(queries) > 0).all():
        twice = int(queries[1:][np.diff(queries) == 0][0])
        raise LeverError(
            "one query id has pools in several datasets or splits",
            where=f"query {twice}",
            hint="choose runs with --run, or give --pool FILE.npy",
        )
    lists = table.column(1).combine_chunks()
    sizes = lists.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return StoredPool(queries, offsets, lists.flatten().to_numpy(zero_copy_only=False))


def _sha256(*arrays: NDArray[np.integer]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.ravel().data)  # a view, where the rows lie in order
    return digest.hexdigest()
