"""View → Arrow record batches: whole groups, in an order that is a pure function of the seed.

In go a connection and a :class:`Selection`, views, filters and a reward as the user asked for them;
out come a :class:`Census` of what is in it and what its filters leave out, and record batches whose
rows of one group stand together. A group is what competes in training: the candidates of one query
and one shot number in one view, or of one query where the reward already weighs the shots. Memory
is bounded by DuckDB's memory limit, beyond which the sort spills to disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa

from lever_data.catalog import TRAINING_COLUMNS, quote_identifier
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import readable_errors

_OPTIONAL = {"logprob_score": "double", "temperature": "double", "scorer": "varchar"}
GROUP_KEY = ("view_index", "dataset", "split", "query_id", "shot_num")


@dataclass(frozen=True)
class Selection:
    """What to stream.

    Args:
        views: relations with the columns ``TRAINING_COLUMNS``; several are interleaved in
            proportion to their sizes.
        reward: SQL expression over the alias ``v`` (see ``rewards.reward_sql``).
        gen_methods: only candidates of these sources; all where empty.
        skip_fallback: leave out rows scored by string matching; an unknown mode stays.
        queries: a relation with dataset, split, query_id to which the stream is limited.
        merge_shots: pointers of different lengths of one query form one group.
        columns: further columns of the views to pass through.
    """

    views: tuple[str, ...]
    reward: str
    gen_methods: tuple[str, ...] = ()
    skip_fallback: bool = False
    queries: str | None = None
    merge_shots: bool = False
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Census:
    """What a selection holds, counted before streaming.

    ``dropped`` counts rows left out by reason (``eval_failed``, ``gen_method``, ``fallback``);
    ``emptied`` counts the queries of which nothing is left. ``last_query`` is the largest query id
    of the rows, -1 without any.
    """

    rows: int
    groups: int
    queries: int
    null_rewards: int
    datasets: tuple[tuple[str, str], ...]
    scorers: tuple[str, ...]
    dropped: dict[str, int]
    emptied: int
    last_query: int


def census(con: duckdb.DuckDBPyConnection, selection: Selection) -> Census:
    """Count what the selection holds and what its filters leave out.

    Raises:
        LeverError: a view lacks a training column or holds no rows, or the reward cannot be
            computed.
    """
    require_columns(con, selection)
    failed, other_source, fallback = conditions(selection)
    keep = f"not ({failed}) and not ({other_source}) and not ({fallback})"
    sql = f"""
        select
            count(*) filter (keep),
            count(distinct (view_index, dataset, split, query_id, shot_num)) filter (keep),
            count(distinct (dataset, split, query_id)) filter (keep),
            count(distinct (dataset, split, query_id)),
            count(*) filter (keep and raw_reward is null),
            list_sort(list(distinct (dataset, split)) filter (keep)),
            list_sort(list(distinct scorer) filter (keep and scorer is not null)),
            count(*) filter (failed),
            count(*) filter (not failed and other_source),
            count(*) filter (not failed and not other_source and fallback),
            coalesce(max(query_id) filter (keep), -1)
        from (
            select
                *,
                {failed} as failed,
                {other_source} as other_source,
                {fallback} as fallback,
                {keep} as keep
            from ({union_sql(con, selection)})
        )"""
    row = run_sql(con.cursor(), sql, {"methods": list(selection.gen_methods)}).fetchall()[0]
    return Census(
        rows=row[0],
        groups=row[1],
        queries=row[2],
        null_rewards=row[4],
        datasets=tuple(tuple(pair) for pair in row[5] or ()),
        scorers=tuple(row[6] or ()),
        dropped={"eval_failed": row[7], "gen_method": row[8], "fallback": row[9]},
        emptied=row[3] - row[2],
        last_query=row[10],
    )


def require_columns(con: duckdb.DuckDBPyConnection, selection: Selection) -> None:
    """Refuse a view that is not there or lacks a training column.

    Raises:
        UsageError: no view is named, or one does not exist.
        LeverError: a view lacks columns; all of them are named.
    """
    if not selection.views:
        raise UsageError("no view is named", hint="--view all_candidates")
    for view in selection.views:
        present = view_columns(con, view)
        missing = [c for c in (*TRAINING_COLUMNS, *selection.columns) if c not in present]
        if missing:
            raise LeverError(
                "the view lacks columns that training needs", where=view, value=", ".join(missing)
            )


def view_columns(con: duckdb.DuckDBPyConnection, view: str) -> set[str]:
    """The names of a relation's columns; UsageError where there is none of that name."""
    try:
        found = con.cursor().execute(f"describe {quote_identifier(view)}").fetchall()
    except duckdb.CatalogException:
        raise UsageError(
            "there is no such view", value=view, hint="`lever views` lists them"
        ) from None
    return {row[0] for row in found}


def conditions(selection: Selection) -> tuple[str, str, str]:
    """SQL conditions of the rows left out: failed, of another source, scored by fallback.

    They read the parameter ``$methods``, a list of gen_method names.
    """
    fallback = "coalesce(eval_mode = 'fallback', false)" if selection.skip_fallback else "false"
    return (
        "coalesce(eval_failed, false)",
        "len($methods::varchar[]) > 0"
        " and not coalesce(list_contains($methods::varchar[], gen_method), false)",
        fallback,
    )


def union_sql(con: duckdb.DuckDBPyConnection, selection: Selection) -> str:
    """SELECT over all views of the selection, before filters, with the column raw_reward."""
    return "\nunion all by name\n".join(
        _one_view(con, selection, index, view) for index, view in enumerate(selection.views)
    )


def _one_view(con: duckdb.DuckDBPyConnection, selection: Selection, index: int, view: str) -> str:
    present = view_columns(con, view)
    optional = [
        f"v.{c}::{kind} as {c}" if c in present else f"null::{kind} as {c}"
        for c, kind in _OPTIONAL.items()
        if c not in selection.columns
    ]
    further = [f"v.{quote_identifier(c)}" for c in selection.columns]
    limit = (
        f" semi join {quote_identifier(selection.queries)} using (dataset, split, query_id)"
        if selection.queries
        else ""
    )
    shots = "0" if selection.merge_shots else "len(v.pointer)"
    listed = ", ".join([*optional, *further])
    return f"""
        select
            {index}::integer as view_index,
            v.dataset,
            v.split,
            v.query_id::bigint as query_id,
            {shots}::tinyint as shot_num,
            v.run,
            v.candidate::integer as candidate,
            v.pointer::integer[] as pointer,
            v.gen_method,
            v.eval_mode,
            v.eval_failed,
            {listed},
            {selection.reward} as raw_reward
        from {quote_identifier(view)} as v{limit}"""


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


def run_sql(
    cursor: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, object]
) -> duckdb.DuckDBPyConnection:
    """Execute with named parameters; what the user's SQL did wrong becomes a LeverError."""
    with readable_errors():
        return cursor.execute(sql, parameters)
