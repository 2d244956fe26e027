"""Which examples a query may be shown: its own pool, or one that all queries share.

In go query ids; out come the ids of their candidates. Three sources: an [n, K] file (row = query
id), the pools stored with the queries, or the sorted union of all ids in any pointer of the
selected runs, taken before view and filters so that ablations share it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lever_data.errors import LeverError, UsageError
from lever_data.readers.vectors import map_npy
from lever_data.relations.db import quote_identifier

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
        _require_rows(query_ids, len(self.table), f"the pool file {self.path}")
        return self.table[query_ids].astype(np.int64)

    def describe(self) -> str:
        """For people and the provenance."""
        return f"{self.path}: {self.table.shape[1]} candidates a query"

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


PoolSource = SharedPool | FilePool | StoredPool


def open_pools(con: duckdb.DuckDBPyConnection, file: str | None, base: str) -> PoolSource:
    """The pools to train with.

    Args:
        con: from ``lever_data.connect``.
        file: a ``.npy`` file [n, K] of example ids; ``None``: the store decides.
        base: relation with a pointer per candidate of the selected runs, before any filter.
    """
    if file is not None:
        return _from_file(file)
    counts = con.cursor().execute(
        "select count(*), count(candidate_pool), min(query_id) filter (candidate_pool is null) "
        "from queries"
    )
    total, pooled, lacking = counts.fetchall()[0]
    if pooled == 0:
        return _shared(con, base)
    if pooled < total:
        raise LeverError(
            f"{pooled:,} of {total:,} queries have a candidate pool of their own, the others none",
            where=f"query {lacking}",
            hint="--pool FILE.npy gives every query one, --run chooses runs that agree",
        )
    return _stored(con)


def _from_file(file: str) -> FilePool:
    try:
        table = map_npy(Path(file))
    except FileNotFoundError:
        raise UsageError("there is no such pool file", value=file) from None
    except (OSError, ValueError) as error:
        raise LeverError(f"the pool file cannot be read ({error})", where=file) from None
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer) or 0 in table.shape:
        raise LeverError(
            "a pool file holds one array [n, K] of candidate ids",
            where=file,
            value=f"{table.dtype} {list(table.shape)}",
        )
    return FilePool(Path(file).name, table)


def _shared(con: duckdb.DuckDBPyConnection, base: str) -> SharedPool:
    sql = f"select distinct unnest(pointer)::bigint as id from {quote_identifier(base)} order by id"
    ids = con.cursor().execute(sql).fetchnumpy()["id"]
    return SharedPool(np.ascontiguousarray(ids, dtype=np.int64))


def _stored(con: duckdb.DuckDBPyConnection) -> StoredPool:
    sql = "select query_id, candidate_pool from queries order by query_id"
    cursor = con.cursor()
    table = cast(pa.Table, cursor.sql(sql).to_arrow_table())
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


def _require_rows(query_ids: Ids, rows: int, what: str) -> None:
    outside = (query_ids >= rows) | (query_ids < 0)
    if outside.any():
        raise LeverError(
            f"{what} has {rows:,} rows, none for a query",
            where=f"query {query_ids[outside][0]}",
        )
