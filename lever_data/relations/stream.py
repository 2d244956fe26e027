"""What a training reads: views, filters and a reward, as one SELECT.

In go a connection and a :class:`Selection` as the user asked for it; out comes its SQL. A group is
what competes in training: the candidates of one query and one shot number in one view, or of one
query where the reward already weighs the shots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import duckdb

from lever_data.catalog import TRAINING_COLUMNS, quote_identifier
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import readable_errors

_OPTIONAL = {"logprob_score": "double", "scorer": "varchar"}
GROUP_KEY = ("view_index", "dataset", "split", "query_id", "shot_num")


@dataclass(frozen=True)
class Selection:
    """What to read.

    Args:
        views: relations with the columns ``TRAINING_COLUMNS``; several are interleaved in
            proportion to their sizes.
        reward: SQL expression over the alias ``v`` (see ``rewards.reward_sql``).
        gen_methods: only candidates of these sources; all where empty.
        skip_fallback: leave out rows scored by string matching; an unknown mode stays.
        queries: a relation with dataset, split, query_id, the queries that are read.
        merge_shots: pointers of different lengths of one query form one group.
        columns: further columns of the views to pass through, as numbers.
    """

    views: tuple[str, ...]
    reward: str
    gen_methods: tuple[str, ...] = ()
    skip_fallback: bool = False
    queries: str | None = None
    merge_shots: bool = False
    columns: tuple[str, ...] = ()


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


def union_sql(con: duckdb.DuckDBPyConnection, selection: Selection, *, limited: bool = True) -> str:
    """SELECT over all views of the selection, before filters, with the column raw_reward; of its
    queries alone where it is ``limited``."""
    if not limited:
        selection = replace(selection, queries=None)
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


def run_sql(
    cursor: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, object]
) -> duckdb.DuckDBPyConnection:
    """Execute with named parameters; what the user's SQL did wrong becomes a LeverError."""
    with readable_errors():
        return cursor.execute(sql, parameters)
