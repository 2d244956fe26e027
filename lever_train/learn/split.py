"""Which queries train and which validate: relations of a connection, made once and remembered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from lever_data.errors import LeverError
from lever_data.relations.db import quote_identifier, readable_errors
from lever_data.relations.stream import run_sql
from lever_data.store.cache import entry, value
from lever_train.options.train import TrainConfig

TRAIN, VALIDATION = "training_queries", "validation_queries"
_FORMAT = 2  # raised where what the cache keeps of an opening means something else
KEY = "dataset, split, query_id"


def remembered(known: str, what: str, made_of: Sequence[object], make: Callable[[], Any]) -> Any:
    """What ``make()`` gives, from the cache where it was asked before.

    Args:
        known: the :func:`identity` of the connection; ``made_of``: the options that count besides.
    """
    return value(["training", _FORMAT, known, what, *made_of], make)


def split_queries(
    con: duckdb.DuckDBPyConnection, base: str, config: TrainConfig, known: str
) -> tuple[int, int, int]:
    """Make the relations of training and validation queries; returns how many each holds, and how
    many are left out because no candidate of theirs is right."""
    data = config.data
    made_of = repr(["split", _FORMAT, known, *split_options(config)])
    key = hashlib.sha256(made_of.encode()).hexdigest()
    with entry(key, lambda folder: _write_split(con, base, config, folder)) as folder:
        # through Arrow: the connection itself may not touch files
        cursor = con.cursor().register("stored", pq.read_table(folder / "split.parquet"))
        cursor.execute("create table split_queries as from stored")
        cursor.unregister("stored")
    # after the split, as every filter is, so that ablations split the same queries
    positive = f" semi join ({_positive_sql(data.view)}) using ({KEY})"
    kept = positive if data.require_positive_query else ""
    for name, condition in ((TRAIN, "is_training"), (VALIDATION, "not is_training")):
        with readable_errors():
            sql = f"select {KEY} from split_queries{kept} where {condition}"
            con.execute(f"create view {name} as {sql}")

    def count() -> list[int]:
        tables = (TRAIN, VALIDATION, "split_queries")
        return [con.cursor().execute(f"select count(*) from {t}").fetchall()[0][0] for t in tables]

    counted = (*split_options(config), data.require_positive_query)
    train, held_out, whole = remembered(known, "split", counted, count)
    return train, held_out, whole - train - held_out


def split_options(config: TrainConfig) -> tuple[object, ...]:
    """What the split depends on, besides the runs and the SQL of the views."""
    data = config.data
    return data.view, data.split_by, data.split_ratio, data.held_out


def _write_split(
    con: duckdb.DuckDBPyConnection, base: str, config: TrainConfig, folder: Path
) -> None:
    """The queries of the base, and which train."""
    data = config.data
    if data.held_out is not None:
        key = "(dataset, split, query_id::bigint)"
        trains = f"{key} not in (select {key} from held_out_queries)"
    elif data.split_by == "id":  # legacy: sorted ids, the first int(ratio · n) train
        own = "partition by dataset, split"  # of a mix, this share of each
        place = f"row_number() over ({own} order by query_id) - 1"
        trains = f"{place} < floor(count(*) over ({own}) * $ratio::double)"
    else:
        key = "concat_ws('/', dataset, split, query_id)"
        place = f"md5_number_lower({key}) / 18446744073709551616.0"  # uniform in [0, 1)
        trains = f"$ratio::double >= 1 or {place} < $ratio::double"
    sql = f"select {KEY}, {trains} as is_training from (select distinct {KEY} from {base})"
    bound = {"ratio": data.split_ratio} if data.held_out is None else {}
    cursor = con.cursor()  # kept alive: on some versions its rows need it
    pq.write_table(cursor.sql(sql, params=bound).to_arrow_table(), folder / "split.parquet")


def _positive_sql(views: Sequence[str]) -> str:
    """The queries with at least one right candidate in any of the views."""
    right = "where correct > 0 and not coalesce(eval_failed, false)"
    return " union ".join(f"select {KEY} from {quote_identifier(v)} {right}" for v in views)


_LACKING_SQL = """
    select
        count(*) filter (s.query_id is null) as "a query of the runs it reads",
        count(*) filter (v.candidate is null) as "a candidate",
        count(*) filter (v.pointer is null) as "a pointer"
    from {view} as v
    left join split_queries as s
        on v.dataset = s.dataset and v.split = s.split and v.query_id::bigint = s.query_id
"""


def require_whole_rows(con: duckdb.DuckDBPyConnection, view: str) -> None:
    """Refuse a view of the user's whose rows would be left out without a word.

    Raises:
        LeverError: rows lack a key that the runs hold, a candidate or a pointer; it counts them.
    """
    found = run_sql(con.cursor(), _LACKING_SQL.format(view=quote_identifier(view)), {})
    for (what, *_), count in zip(found.description, found.fetchall()[0], strict=True):
        if count:
            raise LeverError(
                f"{count:,} rows of the view lack {what}",
                where=view,
                hint="leave them out in its SQL: dataset, split, query_id, candidate and pointer "
                "are those of a stored candidate",
            )
