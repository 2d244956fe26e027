"""Write a run: its tables as Parquet under staging/, then the manifest, then one rename.

In go Arrow batches of any size, through :class:`RunWriter`; out comes the committed run. A table
has fixed row groups, is sorted by its key, and no query crosses a file: the bytes of
``part-00000.parquet``, … depend on the rows alone and not on how they were cut into batches. Rows
that arrive out of key order are sorted outside memory when the table is closed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lever_data import __version__
from lever_data.errors import LeverError
from lever_data.store.draft import Draft
from lever_data.store.files import sha256_file, write_atomic
from lever_data.store.manifest import MANIFEST, SCHEMA_VERSION, Run, RunSpec, sealed, to_json
from lever_data.store.schema import DISTINCT, SORT_KEYS

if TYPE_CHECKING:
    from lever_data.store.store import Store

ROW_GROUP = 65_536
PART_ROWS = 4_000_000
SORT_MEMORY = "160MB"  # keeps an ingest under 300 MB in all; the rest spills to disk


class RunWriter(Draft):
    """A run being written. Leaving the ``with`` block without ``commit`` discards it."""

    def __init__(self, store: Store, spec: RunSpec) -> None:
        super().__init__(store)
        self.spec = spec
        self._tables: dict[str, TableWriter] = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for table in self._tables.values():
            table.abandon()
        super().__exit__(kind, error, trace)

    def write(self, table: str, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows to a table. Rows that come out of order are sorted at commit."""
        if table not in self._tables:
            self._tables[table] = TableWriter(self.folder / table, table, rows.schema)
        self._tables[table].write(rows)

    def commit(self, details: Mapping[str, Any] | None = None) -> Run:
        """Flush, hash and publish the run; returns it.

        A second writer of the same run that comes too late gets the run already there: both
        wrote the same rows.
        """
        for table in self._tables.values():
            table.close()
        manifest = self._manifest(dict(details or {}))
        write_atomic(self.folder / MANIFEST, to_json(sealed(manifest)))
        return self.publish(self.spec.run_id())

    def _manifest(self, details: dict[str, Any]) -> dict[str, Any]:
        files = {
            str(p.relative_to(self.folder)): sha256_file(p)
            for p in sorted(self.folder.rglob("*.parquet"))
        }
        ranges = [t.key_range for t in self._tables.values() if t.key_range is not None]
        low_high = [min(r[0] for r in ranges), max(r[1] for r in ranges)] if ranges else None
        spec = self.spec
        return {
            "run": spec.run_id(),
            "kind": spec.kind,
            "dataset": spec.dataset,
            "split": spec.split,
            "committed_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            "rows": {name: t.num_rows for name, t in sorted(self._tables.items())},
            "files": files,
            "query_range": low_high,
            "source": {**spec.source, "sha256": spec.source_sha256},
            "parameters": spec.parameters,
            "parents": list(spec.parents),
            "details": details,
            "schema_version": SCHEMA_VERSION,
            "lever_version": __version__,
        }


class TableWriter:
    """Streams batches of one table into Parquet parts.

    Args:
        folder: where the parts go; made here.
        name: the table; its sort key is ``schema.SORT_KEYS[name]``.
        schema: the Arrow schema every batch must have.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self.folder = folder
        self.name = name
        self.schema = schema.remove_metadata()
        self.num_rows = 0
        self.key_range: tuple[int, int] | None = None
        self._keys = SORT_KEYS.get(name, ())
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._last: tuple[int, ...] | None = None
        self._sorted = True
        self._part = 0
        self._part_rows = 0
        self._writer: pq.ParquetWriter | None = None
        folder.mkdir()

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows; they may come in any number per call."""
        if rows.schema.remove_metadata() != self.schema:
            raise AssertionError(f"{self.name}: {rows.schema} is not {self.schema}")
        batches = rows.to_batches() if isinstance(rows, pa.Table) else [rows]
        for batch in batches:
            if batch.num_rows:
                self._note_keys(batch)
                self._pending.append(batch)
                self._pending_rows += batch.num_rows
                self.num_rows += batch.num_rows
        while self._pending_rows >= ROW_GROUP:
            self._write_group(ROW_GROUP)

    def close(self) -> None:
        """Write what is pending; sort the whole table where its rows came out of order."""
        self._flush()
        if not self._sorted:
            self._sort()

    def abandon(self) -> None:
        """Close the file handles of a table that will be thrown away."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        if self._pending_rows or (self._writer is None and self._part == 0):
            self._write_group(self._pending_rows)
        self.abandon()

    def _note_keys(self, batch: pa.RecordBatch) -> None:
        if not self._keys:
            return
        columns = [batch.column(k).to_numpy().astype(np.int64) for k in self._keys]
        if self._sorted:
            self._sorted = _is_sorted(columns, self._last)
        self._last = tuple(int(c[-1]) for c in columns)
        low, high = int(columns[0].min()), int(columns[0].max())
        if self.key_range is not None:
            low, high = min(low, self.key_range[0]), max(high, self.key_range[1])
        self.key_range = (low, high)

    def _write_group(self, count: int) -> None:
        table = pa.Table.from_batches(self._pending, self.schema)
        group, rest = table.slice(0, count), table.slice(count)
        self._pending = rest.to_batches()
        self._pending_rows = rest.num_rows
        if self._part_rows and self._part_rows + count > PART_ROWS and self._sorted and self._keys:
            group = self._roll(group)
        self._write_rows(group)

    def _roll(self, group: pa.Table) -> pa.Table:
        """End the part after its last query; returns the rows that open the next part."""
        key = group.column(self._keys[0]).to_numpy()
        stay = int(np.searchsorted(key, self._part_last_key, side="right"))
        if stay:
            self._write_rows(group.slice(0, stay))
        if stay == group.num_rows:
            return group.slice(stay)
        self.abandon()
        self._part += 1
        self._part_rows = 0
        return group.slice(stay)

    def _write_rows(self, rows: pa.Table) -> None:
        if self._writer is None:
            path = self.folder / f"part-{self._part:05d}.parquet"
            self._writer = pq.ParquetWriter(
                path, self.schema, use_dictionary=_repeating(self.schema), **_PARQUET
            )
        self._writer.write_table(rows.combine_chunks(), row_group_size=ROW_GROUP)
        self._part_rows += rows.num_rows
        if rows.num_rows and self._keys:
            self._part_last_key = int(rows.column(self._keys[0])[-1].as_py())

    def _sort(self) -> None:
        """Rewrite the parts in key order with DuckDB, which spills to disk beyond SORT_MEMORY."""
        import duckdb  # 16 MB that an ingest in order does without

        unsorted = self.folder.with_name(f"{self.folder.name}.unsorted")
        self.folder.rename(unsorted)
        fresh = TableWriter(self.folder, self.name, self.schema)
        con = duckdb.connect()
        con.execute("set threads = 1")
        con.execute(f"set memory_limit = '{SORT_MEMORY}'")
        con.execute("set temp_directory = ?", [str(unsorted / "spill")])
        keys = ", ".join(self._keys)
        try:
            rows = con.sql(
                f"select * from read_parquet(?) order by {keys}",
                params=[str(unsorted / "*.parquet")],
            )
            for batch in rows.to_arrow_reader(ROW_GROUP):
                fresh.write(pa.Table.from_batches([batch]).cast(self.schema))
        except duckdb.Error as error:  # the disk is full, or there is too little memory
            fresh.abandon()
            raise LeverError(
                f"sorting {self.name} failed ({error})", where=str(unsorted)
            ) from error
        fresh._flush()
        con.close()
        if fresh.num_rows != self.num_rows:
            raise LeverError(
                f"sorting {self.name} lost rows: {self.num_rows} before, {fresh.num_rows} after"
            )
        shutil.rmtree(unsorted)


_PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "write_statistics": True,
    "store_schema": True,
}


def _repeating(schema: pa.Schema) -> list[str]:
    """The leaves of a schema, as Parquet names them, that are stored as a dictionary."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    found = pq.ParquetFile(sink.getvalue()).schema
    leaves = [found.column(i).path for i in range(len(found))]
    return [leaf for leaf in leaves if leaf.split(".")[0] not in DISTINCT]


def _is_sorted(columns: list[np.ndarray], last: tuple[int, ...] | None) -> bool:
    """Whether rows with these key columns, after a row with keys ``last``, are in key order."""
    less = np.zeros(len(columns[0]) - 1, dtype=bool)
    equal = np.ones(len(columns[0]) - 1, dtype=bool)
    for column in columns:
        less |= equal & (column[1:] < column[:-1])
        equal &= column[1:] == column[:-1]
    if less.any():
        return False
    return last is None or last <= tuple(int(c[0]) for c in columns)
