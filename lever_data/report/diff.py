"""Compare two runs, two views or two evaluations: what only one has, and is the change real.

In go the names of two sides; out comes a :class:`Difference`. Candidates are paired by query and
ordered pointer, evaluations by query and shot number. The score is the accuracy by the
task's metric; what has none, because the answerer failed or nobody scored it, is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import duckdb
import numpy as np

from lever_data.catalog import RL_KINDS, quote_identifier
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import Session, open_session
from lever_data.report.options import DiffRequest
from lever_data.report.statistics import bootstrap_ratio, mcnemar
from lever_data.store.store import Run, Store

Kind = Literal["candidates", "evaluations"]
BASELINES = ("zero_shot", "random", "nearest", "vote", "oracle")  # not checkpoints
_COLUMNS = ("dataset", "split", "query_id", "pointer", "correct", "score")


@dataclass(frozen=True)
class Difference:
    """How B differs from A.

    ``pairs``, ``only_a`` and ``only_b`` count (query, ordered pointer), or (query, shots) of
    evaluations, that have a score. ``mean_change`` is the mean of B's minus A's accuracy over the
    pairs, ``low`` and ``high`` its 95 % interval, images resampled, or queries where they have
    none; null where there is nothing to resample. ``mcnemar_p`` is the exact two-sided p of
    McNemar's test on one pick per query: beam rank 0, else the highest log-probability, else the
    first candidate; of evaluations, the pick at the most shots both have. ``picks`` counts the
    queries where both sides have one.
    """

    a: str
    b: str
    kind: Kind
    pairs: int
    only_a: int
    only_b: int
    changed: int
    mean_change: float | None
    low: float | None
    high: float | None
    picks: int
    picks_right_a: float | None
    picks_right_b: float | None
    mcnemar_only_a: int
    mcnemar_only_b: int
    mcnemar_p: float | None
    is_same: bool  # both names mean the same rows: nothing can differ


def diff(store: Store, request: DiffRequest) -> Difference:
    """Compare two sides.

    Raises:
        UsageError: a name is neither a run nor a view, or the sides are not of one kind.
        LeverError: a view lacks the columns a comparison needs, or both sides are empty.
    """
    session = _open(store, request, request.runs)
    found = [_find_run(store, name, session) for name in (request.a, request.b)]
    if request.runs:
        session.con.close()
        session = _open(store, request, (*request.runs, *(run.run for run in found if run)))
    with session.con as con:
        kinds = {
            _put_side(session, side, getattr(request, side), run)
            for side, run in zip(("a", "b"), found, strict=True)
        }
        if len(kinds) != 1:
            raise UsageError(
                "an evaluation cannot be compared with candidates",
                value=f"{request.a} and {request.b}",
            )
        _require_same_questions(con, found)
        con.execute(_PAIRED)
        if not con.execute("select count(*) from paired").fetchall()[0][0]:
            raise LeverError(
                "neither side holds anything scored to compare",
                value=f"{request.a} and {request.b}",
                hint="`lever views` counts the rows of every view",
            )
        return _measure(con, request, kinds.pop(), _is_same(request, found))


def _is_same(request: DiffRequest, found: Sequence[Run | None]) -> bool:
    """Whether both names mean one run (and selector) or one view: every change would be 0."""
    a, b = (run.run if run else None for run in found)
    if a is None or b is None:
        return request.a == request.b
    return a == b and request.a.partition(":")[2] == request.b.partition(":")[2]


def _require_same_questions(con: duckdb.DuckDBPyConnection, sides: Sequence[Run | None]) -> None:
    """Refuse two runs that give a query of one number different questions."""
    names = [run.run for run in sides if run is not None]
    rows = con.execute(_QUESTIONS, [names]).fetchall()
    if rows:
        query_id, questions = rows[0]
        raise LeverError(
            "the two runs number their questions differently",
            where=f"query {query_id}",
            value=f"questions {' and '.join(questions)}",
            hint="one of them was made from questions in another order (`lever ingest --order`)",
        )


_QUESTIONS = """
    select query_id, list_sort(list(distinct question_id)) as question_ids
    from stg_queries
    where list_contains(?::varchar[], run)
    group by dataset, split, query_id
    having count(distinct question_id) > 1
    order by query_id
    limit 1
"""


def _open(store: Store, request: DiffRequest, runs: Sequence[str]) -> Session:
    tables = ["stg_candidates", "stg_evaluations", "stg_queries", "query_images"]
    wanted = [*tables, request.a, request.b]
    chosen = store.with_examples(runs)
    session = open_session(store, runs=chosen, sql_dir=request.sql_dir, only=wanted)
    names = [run.run for run in store.inventory().runs]
    for name in (request.a, request.b):
        wanted_run = name.partition(":")[0]
        if name not in session.relations and not any(n.startswith(wanted_run) for n in names):
            session.con.close()
            error = open_session(store, sql_dir=request.sql_dir).explain_missing(name)
            raise UsageError(
                "there is neither a run nor a view of this name", value=name, hint=error.hint
            )
    return session


def _measure(
    con: duckdb.DuckDBPyConnection, request: DiffRequest, kind: Kind, is_same: bool
) -> Difference:
    counted = con.execute(_COUNTS).fetchall()[0]
    clusters = con.execute(_CLUSTERS).fetchnumpy()
    picks = con.execute(_PICKS).fetchnumpy()
    right_a, right_b = (np.asarray(picks[side], bool) for side in ("a", "b"))
    test = mcnemar(right_a, right_b)
    change = None
    if counted[0]:
        change = bootstrap_ratio(clusters["change"], clusters["size"], seed=request.seed)
    return Difference(
        a=request.a,
        b=request.b,
        kind=kind,
        pairs=counted[0],
        only_a=counted[1],
        only_b=counted[2],
        changed=counted[3],
        mean_change=None if change is None else change.mean,
        low=None if change is None or len(clusters["size"]) < 2 else change.low,
        high=None if change is None or len(clusters["size"]) < 2 else change.high,
        picks=len(right_a),
        picks_right_a=float(right_a.mean()) if len(right_a) else None,
        picks_right_b=float(right_b.mean()) if len(right_b) else None,
        mcnemar_only_a=test.only_a,
        mcnemar_only_b=test.only_b,
        mcnemar_p=test.p if len(right_a) else None,
        is_same=is_same,
    )


# Each side is a table: dataset, split, query_id, item (what is paired within a query), score,
# is_right, level (picks are compared at the highest that both have) and pick_key (the smallest is
# the query's pick).
_CANDIDATES = """
    select
        dataset,
        split,
        query_id,
        pointer::varchar as item,
        score,
        coalesce(correct = 1, score > 0) as is_right,
        0 as level,
        struct_pack({key}) as pick_key,
        {scorer} as scorer
    from {source}
    where score is not null and {condition}
"""
_EVALUATIONS = """
    select
        dataset,
        split,
        query_id,
        shots::varchar as item,
        accuracy as score,
        correct = 1 as is_right,
        shots as level,
        0 as pick_key
    from stg_evaluations
    where run = ? and selector = ? and accuracy is not null
"""
_PAIRED = """
    create table sums_a as
        select dataset, split, query_id, item, avg(score) as score from side_a group by all;
    create table sums_b as
        select dataset, split, query_id, item, avg(score) as score from side_b group by all;
    create table paired as
        select
            dataset,
            split,
            query_id,
            a.score is not null as in_a,
            b.score is not null as in_b,
            b.score - a.score as change
        from sums_a as a
        full join sums_b as b using (dataset, split, query_id, item)
"""
_COUNTS = """
    select
        count(*) filter (where in_a and in_b),
        count(*) filter (where not in_b),
        count(*) filter (where not in_a),
        count(*) filter (where abs(change) > 1e-9)
    from paired
"""
# queries on one image are drawn together; one whose image nobody tells is drawn alone
_CLUSTERS = """
    select sum(change) as change, count(*) as size
    from paired
    left join query_images using (dataset, split, query_id)
    where in_a and in_b
    group by dataset, split, image_id, if(image_id is null, query_id, null)
    order by dataset, split, min(query_id)
"""
_PICKS = """
    with picks_a as (
        select dataset, split, query_id, level, arg_min(is_right, pick_key) as is_right
        from side_a
        group by dataset, split, query_id, level
    ),

    picks_b as (
        select dataset, split, query_id, level, arg_min(is_right, pick_key) as is_right
        from side_b
        group by dataset, split, query_id, level
    )

    select arg_max(a.is_right, a.level) as a, arg_max(b.is_right, b.level) as b
    from picks_a as a
    inner join picks_b as b using (dataset, split, query_id, level)
    group by dataset, split, query_id
    order by dataset, split, query_id
"""
_PICK_KEY = {  # column → what makes a candidate the query's pick, by weight
    "beam_rank": "coalesce(beam_rank <> 0, true)",
    "logprob_score": "coalesce(-logprob_score, 'infinity'::double)",
    "run": "run",
    "candidate": "candidate",
}


def _put_side(session: Session, side: str, name: str, run: Run | None) -> Kind:
    """Make the table of one side, a run or else a view."""
    create = f"create table side_{side} as "
    if run is None:
        sql = _view_sql(session, name)
        session.con.execute(create + sql)
        _require_one_scorer(session.con, side, name)
        return "candidates"
    if run.kind == "evaluation":
        chosen = _selector(session.con, run, name.partition(":")[2])
        session.con.execute(create + _EVALUATIONS, [run.run, chosen])
        return "evaluations"
    if run.kind not in RL_KINDS:
        raise UsageError(f"a run of kind {run.kind} has nothing to compare", value=run.run)
    if ":" in name:
        raise UsageError("only a run of kind evaluation has selectors to name", value=name)
    condition = "run = ? and eval_failed is not true"
    key = _struct_of(list(_PICK_KEY.values()))
    sql = _CANDIDATES.format(key=key, source="stg_candidates", condition=condition, scorer="scorer")
    session.con.execute(create + sql, [run.run])
    _require_one_scorer(session.con, side, name)
    return "candidates"


def _require_one_scorer(con: duckdb.DuckDBPyConnection, side: str, name: str) -> None:
    """Refuse a side whose answers are of several models: their mean is nobody's."""
    sql = f"select distinct scorer from side_{side} where scorer is not null order by scorer"
    scorers = [scorer for (scorer,) in con.execute(sql).fetchall()]
    if len(scorers) > 1:
        raise UsageError(
            f"{name} holds answers of several models",
            value=", ".join(scorers),
            hint="compare the run of one, or a view of your own that has but one scorer",
        )


def _struct_of(expressions: Sequence[str]) -> str:
    """Named fields, compared in order; DuckDB 1 keeps no unnamed ones in a table."""
    return ", ".join(f"k{i} := {sql}" for i, sql in enumerate(expressions))


def _find_run(store: Store, name: str, session: Session) -> Run | None:
    """The run of this id; else, where no view has the name, the only run with this prefix."""
    wanted = name.partition(":")[0]
    runs = store.inventory().runs
    found = [run for run in runs if run.run == wanted]
    if not found and wanted and name not in session.relations:
        found = [run for run in runs if run.run.startswith(wanted)]
    return found[0] if len(found) == 1 else None


def _view_sql(session: Session, name: str) -> str:
    if name not in session.relations:
        raise UsageError("several runs begin like this", value=name, hint="give more of the id")
    view = quote_identifier(name)
    present = [row[0] for row in session.con.execute(f"describe {view}").fetchall()]
    if missing := [c for c in _COLUMNS if c not in present]:
        raise LeverError(
            "the view cannot be compared: it has no column " + ", ".join(missing), where=name
        )
    key = _struct_of([*(sql for c, sql in _PICK_KEY.items() if c in present), "pointer"])
    condition = "eval_failed is not true" if "eval_failed" in present else "true"
    scorer = "scorer" if "scorer" in present else "null::varchar"
    return _CANDIDATES.format(key=key, source=view, condition=condition, scorer=scorer)


def _selector(con: duckdb.DuckDBPyConnection, run: Run, wanted: str) -> str:
    """The selector of an evaluation to compare: the one named, else its only checkpoint."""
    rows = con.execute(
        "select distinct selector from stg_evaluations where run = ? order by selector", [run.run]
    ).fetchall()
    names = [row[0] for row in rows]
    choice = [wanted] if wanted else [name for name in names if name not in BASELINES]
    if len(choice) != 1 or choice[0] not in names:
        raise UsageError(
            "which selector of the evaluation?",
            value=wanted or run.run,
            hint=f"name it as {run.run}:SELECTOR, one of {', '.join(names)}",
        )
    return choice[0]
