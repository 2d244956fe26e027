"""What the views read, and which of its queries train and which validate: made once, remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import duckdb
import numpy as np
import pyarrow as pa

from lever_data.catalog import enum_sql, quote_literal
from lever_data.errors import LeverError
from lever_data.relations.db import (
    empty_view,
    open_session,
    quote_identifier,
    readable_errors,
)
from lever_data.relations.records import Ids, distinct, integers, numbers, save_array
from lever_data.relations.stream import run_sql
from lever_data.store.cache import entry, value
from lever_train.options.train import Source, TrainConfig

TRAIN, VALIDATION = "training_queries", "validation_queries"
_FORMAT = 3  # raised where what the cache keeps of an opening means something else
KEY = "dataset, split, query_id"
_ROWS = 65_536
_SPLIT = np.dtype([("query_id", "<i8"), ("place", "<i2"), ("is_training", "i1")])


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
        _put_split(con, folder)
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


def _put_split(con: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """The table ``split_queries``: 11 bytes a query, as it stays in memory; with texts it were 41,
    and 55 MB at 20 million candidates."""
    places = json.loads((folder / "places.json").read_text())
    bound = {"datasets": [d for d, _ in places], "splits": [s for _, s in places]}
    dataset, split = (enum_sql(sorted(set(names)) or [""]) for names in bound.values())
    con.execute(
        f"create table split_queries (dataset {dataset}, split {split}, query_id bigint, "
        "is_training bool)"
    )
    sql = (
        "insert into split_queries select ($datasets::varchar[])[place + 1], "
        "($splits::varchar[])[place + 1], query_id, is_training from stored"
    )
    stored = np.load(folder / "split.npy", mmap_mode="r")
    # through Arrow: the connection itself may not touch files. Arrays of numpy and no Parquet file,
    # for which Arrow's allocator keeps 40 MB
    for start in range(0, len(stored), _ROWS):
        part = stored[start : start + _ROWS]
        columns = {name: integers(part[name]) for name in _SPLIT.names or ()}
        cursor = con.cursor().register("stored", pa.table(columns))
        cursor.execute(sql, bound)
        cursor.unregister("stored")


def split_options(config: TrainConfig) -> tuple[object, ...]:
    """What the split depends on, besides the runs and the SQL of the views."""
    data = config.data
    return data.view, data.split_by, data.split_ratio, data.held_out


def _write_split(
    con: duckdb.DuckDBPyConnection, base: str, config: TrainConfig, folder: Path
) -> None:
    """The queries of the base, and which train."""
    sql = (
        f"select query_id, $place::smallint, ({_trains_sql(config)})::tinyint from "
        "(select *, $dataset::varchar as dataset, $split::varchar as split from asked)"
    )
    own = f"select distinct dataset, split from {base} order by all"
    places = con.cursor().execute(own).fetchall()
    found = bytearray()
    for place, (dataset, split) in enumerate(places):
        ids = _queries(con, base, dataset, split)
        bound = {"place": place, "dataset": dataset, "split": split}
        known = {"ratio": config.data.split_ratio, "count": len(ids)}
        bound |= {name: value for name, value in known.items() if f"${name}" in sql}
        for start in range(0, len(ids), _ROWS):
            part = ids[start : start + _ROWS]
            number = np.arange(start, start + len(part))
            asked = {"query_id": integers(part), "number": integers(number)}
            cursor = con.cursor().register("asked", pa.table(asked))
            columns = cursor.execute(sql, bound).fetchnumpy().values()
            cursor.unregister("asked")
            rows = np.empty(len(part), _SPLIT)
            for name, values in zip(_SPLIT.names or (), columns, strict=True):
                rows[name] = values
            found += rows.tobytes()
    save_array(folder / "split.npy", np.frombuffer(found, _SPLIT))
    (folder / "places.json").write_text(json.dumps(places))


def _trains_sql(config: TrainConfig) -> str:
    """Whether a query trains, by its key and its ``number`` among the ``$count`` of its place."""
    data = config.data
    if data.held_out is not None:
        key = "(dataset, split, query_id::bigint)"
        return f"{key} not in (select {key} from held_out_queries)"
    if data.split_by == "id":  # legacy: sorted ids, the first int(ratio · n) of a place train
        return "number < floor($count::bigint * $ratio::double)"
    key = "concat_ws('/', dataset, split, query_id)"
    place = f"md5_number_lower({key}) / 18446744073709551616.0"  # uniform in [0, 1)
    return f"$ratio::double >= 1 or {place} < $ratio::double"


def _queries(con: duckdb.DuckDBPyConnection, base: str, dataset: str, split: str) -> Ids:
    """The distinct queries of a place, ascending.

    Those of one query mostly stand together: 20 MB for 1.3 million of them, where DuckDB takes 80.
    """
    sql = f"select query_id from {base} where dataset = $dataset and split = $split"
    cursor = con.cursor()  # kept alive: on some versions its rows need it
    found = bytearray()
    place = {"dataset": dataset, "split": split}
    for batch in cursor.sql(sql, params=place).to_arrow_reader(_ROWS):
        found += distinct(numbers(batch.column(0), "query_id")).tobytes()
    ids = np.frombuffer(found, np.int64)
    ids.sort()
    return distinct(ids)


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


def read_held_out(source: Source, con: duckdb.DuckDBPyConnection, config: TrainConfig) -> str:
    """Make the relation ``held_out_queries`` where a view names them; returns a digest of them.

    They are those of the whole store: what a view of folds reads, the questions, lies beside the
    runs that are trained on.
    """
    view = config.data.held_out
    if view is None:
        return ""
    session = open_session(source.store, sql_dir=source.sql_dir, only=(view,))
    if view not in session.relations:
        raise open_session(source.store, sql_dir=source.sql_dir).explain_missing(view)
    key = "dataset, split, query_id::bigint as query_id"
    sql = f"select distinct {key} from {quote_identifier(view)} order by all"
    with readable_errors():
        cursor = session.con.cursor()  # kept alive: on some versions the reader needs it
        found = cast(pa.Table, cursor.sql(sql).to_arrow_table())
    cursor = con.cursor().register("named", found)
    cursor.execute("create table held_out_queries as from named")
    cursor.unregister("named")
    return hashlib.sha256(repr(found.to_pydict()).encode()).hexdigest()


def runs_read(con: duckdb.DuckDBPyConnection, views: Sequence[str]) -> list[list[str | None]]:
    """The runs the views' rows come from, by id, each with a dataset and split of theirs; none
    where a view of the user's has none."""
    union = " union ".join(f"select run, dataset, split from {quote_identifier(v)}" for v in views)
    rows = con.cursor().execute(f"select distinct * from ({union}) order by all").fetchall()
    return [list(row) for row in rows]


def base_relation(
    con: duckdb.DuckDBPyConnection, views: Sequence[str], read: Sequence[Sequence[str | None]]
) -> str:
    """A relation with every stored pointer of the kind of the runs that the views ``read``,
    unfiltered, of the datasets and splits that the views hold.

    Raises:
        LeverError: the views hold no rows.
    """
    rows = (
        con.cursor()
        .execute(
            "select distinct kind = 'beam' from runs where run in (select unnest(?))",
            [list({run for run, *_ in read})],
        )
        .fetchall()
    )
    if not rows:
        hint = "`lever runs` lists the runs"
        raise empty_view(con, ", ".join(views), "the view holds no rows", hint)
    parts = ["stg_beams" if is_beam else "stg_candidates" for (is_beam,) in sorted(rows)]
    union = " union all ".join(f"select {KEY}, pointer from {part}" for part in parts)
    # another dataset or split of the same runs is not part of this training: its queries would
    # take places in the split, and its pointers in the shared pool
    own = [
        f"(dataset = {quote_literal(dataset)} and split = {quote_literal(split)})"
        for _, dataset, split in read
        if dataset is not None and split is not None
    ]
    here = " or ".join(sorted(set(own))) or "false"
    con.execute(f"create view training_base as select * from ({union}) where {here}")
    return "training_base"
