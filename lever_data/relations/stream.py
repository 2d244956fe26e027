"""What a training reads: views, filters and a reward, as one SELECT, and its rows.

In go a connection and a :class:`Selection` as the user asked for it; out comes its SQL, or a
:class:`Source` that hands on its rows as Arrow batches. A group is
what competes in training: the candidates of one query and one shot number in one view, or of one
query where the reward already weighs the shots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import duckdb
import numpy as np
import pyarrow as pa

from lever_data.catalog import TRAINING_COLUMNS, enum_sql, quote_identifier
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import readable_errors
from lever_data.relations.records import DROPPED, GROUP_KEY, WITHIN, Records, numbers

_OPTIONAL = {"logprob_score": "double", "scorer": "varchar"}
_BATCH_ROWS = 65_536
_NAN = "'nan'::double"
_TEXTS = ("dataset", "split", "run")  # as numbers, in the order of their names


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
