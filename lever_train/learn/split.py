"""Which queries train and which validate, decided before any view or filter.

In go the views of a training, out come the relations ``training_queries`` and
``validation_queries``. They are made from every stored candidate of the runs the views read, so
that ablations compare the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import quote_identifier
from lever_data.relations.selection import run_sql
from lever_train.options.train import TrainConfig

TRAIN, VALIDATION = "training_queries", "validation_queries"
_KEY = "dataset, split, query_id"


def runs_read(con: duckdb.DuckDBPyConnection, views: Sequence[str]) -> list[str]:
    """The runs the views' rows come from, by id."""
    union = " union ".join(f"select run from {quote_identifier(v)}" for v in views)
    rows = con.cursor().execute(f"select distinct run from ({union}) order by run").fetchall()
    return [row[0] for row in rows]


def base_relation(con: duckdb.DuckDBPyConnection, views: Sequence[str]) -> str:
    """A relation with every stored pointer of the kind of runs the views read, unfiltered, of the
    datasets and splits that the views hold.

    Raises:
        LeverError: the views hold no rows.
    """
    rows = (
        con.cursor()
        .execute(
            "select distinct kind = 'beam' from runs where run in (select unnest(?))",
            [runs_read(con, views)],
        )
        .fetchall()
    )
    if not rows:
        raise LeverError(
            "the view holds no rows", where=", ".join(views), hint="`lever runs` lists the runs"
        )
    parts = ["stg_beams" if is_beam else "stg_candidates" for (is_beam,) in sorted(rows)]
    union = " union all ".join(f"select {_KEY}, pointer from {part}" for part in parts)
    # another dataset or split of the same runs is no part of this training: its queries would
    # take places in the split, and its pointers in the shared pool
    own = " union ".join(f"select dataset, split from {quote_identifier(v)}" for v in views)
    con.execute(
        f"create view training_base as select * from ({union}) "
        f"semi join (select distinct dataset, split from ({own})) using (dataset, split)"
    )
    return "training_base"


def split_queries(
    con: duckdb.DuckDBPyConnection, base: str, config: TrainConfig
) -> tuple[int, int]:
    """Make the relations of training and validation queries; returns how many each holds.

    Raises:
        UsageError: none is left to train on.
    """
    data = config.data
    if data.split_by == "id":  # legacy: sorted ids, the first int(ratio · n) train
        own = "partition by dataset, split"  # of a mix, this share of each
        place = f"row_number() over ({own} order by query_id) - 1"
        trains = f"{place} < floor(count(*) over ({own}) * $ratio::double)"
    else:
        key = "concat_ws('/', dataset, split, query_id)"
        place = f"md5_number_lower({key}) / 18446744073709551616.0"  # uniform in [0, 1)
        trains = f"$ratio::double >= 1 or {place} < $ratio::double"
    con.execute(
        f"create table split_queries as select {_KEY}, {trains} as is_training "
        f"from (select distinct {_KEY} from {base})",
        {"ratio": data.split_ratio},
    )
    counts = []
    for name, condition in ((TRAIN, "is_training"), (VALIDATION, "not is_training")):
        con.execute(f"create view {name} as select {_KEY} from split_queries where {condition}")
        counts.append(int(con.cursor().execute(f"select count(*) from {name}").fetchall()[0][0]))
    if not counts[0]:
        raise UsageError("no query is left to train on", value=f"--split-ratio {data.split_ratio}")
    return counts[0], counts[1]


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
