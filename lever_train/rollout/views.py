"""What views say to a rollout: which queries, which pointers, which rewards are stored.

In go a connection, a view and the (dataset, split) meant; out come arrays, in key order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.relations.db import quote_identifier
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import reward_sql
from lever_data.relations.stream import view_columns
from lever_train.rollout.propose import METHODS, Proposals

_COLUMNS = {
    "gen_method": "varchar",
    "beam_rank": "integer",
    "beam_score": "double",
    "logprob_score": "double",
    "temperature": "double",
}
Ids = npt.NDArray[np.int64]


def places(con: duckdb.DuckDBPyConnection, view: str) -> list[tuple[str, str]]:
    """The (dataset, split) pairs a view holds."""
    _require(con, view, ["dataset", "split", "query_id"])
    sql = f"select distinct dataset, split from {quote_identifier(view)} order by all"
    return [(d, s) for d, s in con.cursor().execute(sql).fetchall()]


def query_ids(con: duckdb.DuckDBPyConnection, view: str, dataset: str, split: str) -> Ids:
    """The distinct queries of a view, ascending."""
    _require(con, view, ["dataset", "split", "query_id"])
    sql = (
        f"select distinct query_id::bigint as query_id from {quote_identifier(view)} "
        "where dataset = ? and split = ? order by 1"
    )
    found = con.cursor().execute(sql, [dataset, split]).fetchnumpy()["query_id"]
    return np.ascontiguousarray(found, dtype=np.int64)


def pointers(
    con: duckdb.DuckDBPyConnection, view: str, dataset: str, split: str, shots: int | None
) -> tuple[Ids, Proposals]:
    """The queries of a view and the pointers it holds, each once, in (run, candidate) order.

    Args:
        shots: keep at most this many demonstrations; ``None``: as they are.

    Raises:
        LeverError: a pointer is shorter than ``shots``.
    """
    _require(con, view, ["dataset", "split", "query_id", "pointer", "run", "candidate"])
    present = view_columns(con, view)
    extra = [
        f"{c}::{kind} as {c}" if c in present else f"null::{kind} as {c}"
        for c, kind in _COLUMNS.items()
    ]
    sql = (
        f"select query_id::bigint as query_id, pointer::bigint[] as pointer, {', '.join(extra)} "
        f"from {quote_identifier(view)} where dataset = ? and split = ? "
        "order by query_id, run, candidate"
    )
    cursor = con.cursor()
    table = cast(pa.Table, cursor.sql(sql, params=[dataset, split]).to_arrow_table())
    column: Ids = table.column("query_id").to_numpy()
    asked, row = np.unique(column, return_inverse=True)
    padded = _padded(table.column("pointer").combine_chunks())
    if shots is not None:
        short = (padded[:, :shots] < 0).any(1) | (padded.shape[1] < shots)
        if short.any():
            raise LeverError(
                f"a pointer of the view has fewer than {shots} demonstrations",
                where=f"{view}, query {asked[row[np.flatnonzero(short)[0]]]}",
                hint="lower --shot-num",
            )
        padded = padded[:, :shots]
    found = _stored(table, row.astype(np.int64), padded)
    keyed = np.column_stack([found.row, found.pointer])
    first = np.sort(np.unique(keyed, axis=0, return_index=True)[1])
    return asked.astype(np.int64), found.select(first)


@dataclass(frozen=True)
class Stock:
    """What is stored about the queries a job targets.

    ``pointers``: per query id the ordered pointers stored; ``rewards``: per query id the lowest
    and highest hard_plus_soft reward, absent where nothing is scored.
    """

    pointers: dict[int, set[tuple[int, ...]]]
    rewards: dict[int, tuple[float, float]]


def stock(con: duckdb.DuckDBPyConnection, dataset: str, split: str, ids: Ids) -> Stock:
    """The stored pointers (failed ones too) and rewards of ``ids``."""
    reward = reward_sql(RewardSpec())
    sql = (
        f"select query_id, list(pointer), "
        f"min({reward}) filter (eval_failed is not true), "
        f"max({reward}) filter (eval_failed is not true) from candidates as v "
        "where dataset = ? and split = ? and query_id in (select unnest(?::bigint[])) group by 1"
    )
    rows = con.cursor().execute(sql, [dataset, split, ids.tolist()]).fetchall()
    return Stock(
        {q: {tuple(p) for p in stored} for q, stored, _, _ in rows},
        {q: (low, high) for q, _, low, high in rows if low is not None},
    )


def _stored(table: pa.Table, row: Ids, padded: Ids) -> Proposals:
    """Stored candidates as proposals: positions and the log-probability at 1 are not known."""

    def number(name: str) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = (
            table.column(name).cast(pa.float64()).fill_null(float("nan")).to_numpy()
        )
        return values

    code = {name: index for index, name in enumerate(METHODS)}
    methods = [code.get(m, len(METHODS)) for m in table.column("gen_method").to_pylist()]
    return Proposals(
        row=row,
        positions=np.full(padded.shape, -1, dtype=np.int64),
        pointer=padded,
        method=np.array(methods, dtype=np.int64),
        rank=np.nan_to_num(number("beam_rank"), nan=-1).astype(np.int64),
        score=number("beam_score"),
        log_prob=np.full(len(row), np.nan),
        log_prob_at=number("logprob_score"),
        temperature=number("temperature"),
    )


def _padded(lists: pa.ListArray) -> Ids:
    """Lists as [M, S] int64, -1 after the end of a shorter one."""
    sizes = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    inside = np.arange(sizes.max(initial=1)) < sizes[:, None]
    padded = np.full(inside.shape, -1, dtype=np.int64)
    padded[inside] = lists.flatten().to_numpy(zero_copy_only=False)
    return padded


def _require(con: duckdb.DuckDBPyConnection, view: str, columns: list[str]) -> None:
    if missing := [c for c in columns if c not in view_columns(con, view)]:
        raise LeverError("the view lacks columns", where=view, value=", ".join(missing))
