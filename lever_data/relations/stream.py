"""View → Arrow record batches: whole groups, in an order that is a pure function of the seed.

In go a connection and a :class:`Selection`; out come record batches whose rows of one group stand
together. A group is what competes in training: the candidates of one query and one shot number in
one view, or of one query where the reward already weighs the shots. Memory is bounded by DuckDB's
memory limit, beyond which the sort spills to disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.relations.selection import (
    GROUP_KEY,
    Census,
    Selection,
    census,
    conditions,
    readable_errors,
    require_columns,
    run_sql,
    union_sql,
)

__all__ = ["Census", "Selection", "census", "group_starts", "scan"]


def scan(
    con: duckdb.DuckDBPyConnection,
    selection: Selection,
    *,
    order: Literal["random", "file"] = "random",
    seed: int = 0,
    epoch: int = 0,
    skip_groups: int = 0,
    batch_rows: int = 65_536,
) -> Iterator[pa.RecordBatch]:
    """Stream the selection as record batches of whole groups.

    Args:
        con: from ``lever_data.connect``; the stream takes a cursor of its own.
        order: ``random`` is a permutation of the groups that depends on (seed, epoch) alone;
            ``file`` is by query.
        skip_groups: groups at the head of the order to leave out: where a resumed run stands.
        batch_rows: rows per batch, about; a group never crosses a batch.

    Yields:
        Batches with view_index int32, dataset, split, query_id int64, shot_num int8 (0 where
        shots are merged), run, candidate int32, pointer list<int32>, gen_method, logprob_score
        (nats, nullable), temperature, reward float64 (a missing reward counts as 0), and the
        columns asked for. Within a group rows stand by (run, candidate).

    Raises:
        LeverError: the rows that came differ from the rows the view holds, or a reward is not
            finite.
    """
    require_columns(con, selection)
    failed, other_source, fallback = conditions(selection)
    source = (
        f"from ({union_sql(con, selection)}) "
        f"where not ({failed}) and not ({other_source}) and not ({fallback})"
    )
    bound: dict[str, object] = {"methods": list(selection.gen_methods)}
    expected = run_sql(con.cursor(), f"select count(*) {source}", bound).fetchall()[0][0]
    key = ", ".join(GROUP_KEY)
    shuffled = ""
    if order == "random":
        shuffled = f"hash({key}, $seed::bigint, $epoch::bigint), "
        bound |= {"seed": seed, "epoch": epoch}
    cursor = con.cursor()  # kept alive by this frame: on some versions the reader needs it
    reader = _read(
        cursor,
        f"select * exclude (raw_reward, eval_mode, eval_failed), "
        f"coalesce(raw_reward, 0)::double as reward {source} "
        f"order by {shuffled}{key}, run, candidate",
        bound,
        batch_rows,
    )
    yield from _whole_groups(reader, skip_groups, expected, selection.views)


def _read(
    cursor: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, object], batch_rows: int
) -> pa.RecordBatchReader:
    with readable_errors():
        return cursor.sql(sql, params=parameters).to_arrow_reader(batch_rows)


def _whole_groups(
    reader: pa.RecordBatchReader, skip: int, expected: int, views: tuple[str, ...]
) -> Iterator[pa.RecordBatch]:
    """Cut the reader's batches at group boundaries, drop the first ``skip`` groups, count rows."""
    held: pa.Table | None = None
    seen = 0
    for batch in reader:
        if not batch.num_rows:
            continue
        seen += batch.num_rows
        table = pa.Table.from_batches([batch])
        table = table if held is None else pa.concat_tables([held, table]).combine_chunks()
        starts = group_starts(table)
        skip, whole = _drop(table, starts, skip)
        held = table.slice(int(starts[-1]))
        if whole is not None:
            yield whole
    if held is not None and not skip:
        yield _finite(held)
    if seen != expected:
        raise LeverError(
            "the stream gave other rows than the view holds; the store changed under it",
            where=", ".join(views),
            value=f"{seen} of {expected}",
            hint="start the command again",
        )


def _drop(table: pa.Table, starts: np.ndarray, skip: int) -> tuple[int, pa.RecordBatch | None]:
    """The groups of ``table`` but its last, which may go on, and but the first ``skip``."""
    complete = len(starts) - 1
    dropped = min(skip, complete)
    first, last = int(starts[dropped]), int(starts[-1])
    whole = _finite(table.slice(first, last - first)) if last > first else None
    return skip - dropped, whole


def group_starts(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
    """Row numbers at which a group begins, int64; rows of a group stand together."""
    change = np.zeros(max(rows.num_rows - 1, 0), dtype=bool)
    for name in GROUP_KEY:
        column = rows.column(name)
        if pa.types.is_string(column.type):
            column = column.dictionary_encode()
            column = column.unify_dictionaries() if isinstance(column, pa.ChunkedArray) else column
            column = pa.chunked_array([column]) if isinstance(column, pa.Array) else column
            values = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
        else:
            values = column.to_numpy()
        change |= values[1:] != values[:-1]
    return np.concatenate([[0], np.flatnonzero(change) + 1]).astype(np.int64)


def _finite(table: pa.Table) -> pa.RecordBatch:
    batch = table.combine_chunks().to_batches()[0]
    reward = batch.column("reward").to_numpy()
    if not np.isfinite(reward).all():
        at = int(np.flatnonzero(~np.isfinite(reward))[0])
        raise LeverError(
            "a reward is not a finite number",
            where=f"query {batch.column('query_id')[at].as_py()}",
            value=float(reward[at]),
        )
    return batch
