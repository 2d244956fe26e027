"""Audit a view before training: which queries can teach, and which rewards are noise.

In go a store and an :class:`AuditRequest`; out comes an :class:`Audit`: figures with stable keys,
and the SQL behind each. Every figure is a query over ``sql/diagnostics``, which
:mod:`lever_data.report.scored` has pointed at the chosen view and reward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from lever_data import __version__
from lever_data.catalog import body, builtin
from lever_data.errors import LeverError, UsageError
from lever_data.items.items import require_same_questions
from lever_data.items.task import is_vqa_scorer
from lever_data.relations.db import Session, identity, open_session
from lever_data.relations.rewards import with_todays_columns
from lever_data.report.options import AuditRequest
from lever_data.report.scored import (
    DECIMALS,
    SHARED,
    define_diagnostics,
    read_by_diagnostics,
)
from lever_data.store.cache import value
from lever_data.store.files import sha256_file
from lever_data.store.manifest import MANIFEST, Run
from lever_data.store.store import Store

__all__ = ["CLASSES", "Audit", "AuditRequest", "audit", "audit_views"]

MEMORY_LIMIT = "3GB"  # DuckDB's; beyond it, it spills to disk

_TABLES = {  # key of the figures → diagnostic shown whole
    "by_gen_method": "reward_by_gen_method",
    "by_temperature": "reward_by_temperature",
    "by_beam_rank": "reward_by_beam_rank",
    "by_shot": "reward_by_shot",
    "eval_modes": "eval_modes",
    "logprob_vs_reward": "logprob_vs_reward",
    "importance_weights": "importance_weights",
    "order_sensitivity": "order_sensitivity",
    "answer_copying": "answer_copying",
    "reward_modes": "reward_modes",
    "reward_spread": "reward_spread",
}
CLASSES = ("mixed", "all_wrong", "all_right", "tied")
_TOP = 10  # demonstrations listed


@dataclass(frozen=True)
class Audit:
    """Figures with stable keys (shares are fractions), and the SQL of every relation used."""

    figures: dict[str, Any]
    sql: dict[str, str]


def audit(store: Store, request: AuditRequest) -> Audit:
    """Audit one view.

    Raises:
        LeverError: the store has no runs, the view is unknown, empty or lacks a training column,
            the reward cannot be computed from its columns, or its queries are other questions
            than the examples of their numbers.
    """
    with _opened(store, request) as (session, request):
        # runs do not change: the same question to the same runs has the answer it had
        asked = [__version__, "audit", identity(session.con), request.model_dump_json(), _sql()]
        return Audit(**value(asked, lambda: vars(_audit(session, store, request))))


@contextmanager
def audited(
    store: Store, request: AuditRequest
) -> Iterator[tuple[duckdb.DuckDBPyConnection, Audit]]:
    """Audit one view, and keep open what it was computed from: the diagnostics over that view.

    Raises:
        LeverError: as :func:`audit`.
    """
    with _opened(store, request) as (session, request):
        yield session.con, _audit(session, store, request)


@contextmanager
def _opened(store: Store, request: AuditRequest) -> Iterator[tuple[Session, AuditRequest]]:
    """The relations, and the request with its reward over columns as they are called now."""
    stored = store.inventory()
    if not stored.runs and not stored.damaged:
        raise LeverError(
            "the store has no runs yet, so there is nothing to audit",
            where=str(store.path),
            hint="bring RL data in first: `lever ingest rl_data.json --store DIR`",
        )
    session = _open(store, request)
    try:
        reward = with_todays_columns(session.con, [request.view], request.reward)
        yield session, request.but(reward=reward)
    except duckdb.Error as error:
        raise LeverError(
            f"the audit's SQL failed over this view: {str(error).splitlines()[0]}",
            where=request.view,
            hint=f"`lever query 'select * from {request.view} limit 5'` shows what it holds",
        ) from error
    finally:
        session.con.close()


def _audit(session: Session, store: Store, request: AuditRequest) -> Audit:
    survey, scored = define_diagnostics(session, request)
    places = session.con.execute("from scored_places").fetchall()
    for dataset, split in places:  # else every demonstration has another's name
        require_same_questions(session.con, dataset, split)
    scorers = survey.levels["scorer"]
    named = {"runs": survey.levels["run"], "places": [f"{d}/{s}" for d, s in places]}
    figures = _figures(session.con, store, request, named)
    figures |= {"missing_share": survey.missing_share, "scorers": scorers}
    if not any(map(is_vqa_scorer, scorers or [""])):
        figures["few_annotators"]["num_few"] = 0  # other metrics ask for no agreement
    return Audit(figures, {"scored": scored, **_sql()})


def audit_views(store: Store | Path, request: AuditRequest, views: Sequence[str]) -> list[Audit]:
    """The same audit of several views, to set them side by side."""
    opened = store if isinstance(store, Store) else Store.open(store)
    return [audit(opened, request.but(view=view)) for view in views]


def _open(store: Store, request: AuditRequest) -> Session:
    policy = [] if request.policy is None else [request.policy]
    wanted = [request.view, *read_by_diagnostics(), "own_pointers", *policy]
    runs = _chosen(store, request)
    session = open_session(
        store, runs=runs, scorer=request.scorer, sql_dir=request.sql_dir, only=wanted
    )
    for name in [request.view, *policy]:
        if name not in session.relations:
            session.con.close()
            raise session.explain_missing(name)
    session.con.execute("set memory_limit = ?", [MEMORY_LIMIT])
    session.con.execute("set enable_progress_bar = false")  # it would print to stdout
    return session


def _chosen(store: Store, request: AuditRequest) -> list[str]:
    """The runs to read; none are named where all are."""
    known = store.inventory().runs
    if request.dataset is None and request.split is None:
        chosen = [*request.runs]
    else:
        named = {run.run for run in store.select(request.runs)} if request.runs else None
        chosen = [
            run.run
            for run in known
            if request.dataset in (None, run.dataset)
            and request.split in (None, run.split)
            and (named is None or run.run in named)
        ]
        if not chosen:
            raise UsageError(
                "the store has no runs of this dataset and split",
                value=f"{request.dataset or 'any'}/{request.split or 'any'}",
                hint=f"it has {', '.join(sorted({f'{r.dataset}/{r.split}' for r in known}))}",
            )
    if chosen:  # chosen runs are chosen candidates; what is asked and answered comes along
        chosen += [run.run for run in known if run.kind == "examples" and run.run not in chosen]
    return chosen


def _figures(
    con: duckdb.DuckDBPyConnection,
    store: Store,
    request: AuditRequest,
    named: dict[str, list[str]],
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "view": request.view,
        "reward_mode": "expression" if request.reward.expression else request.reward.mode,
        "reward": request.reward.name,
        **named,
    }
    figures |= _one_row(con, _TOTALS_SQL) | _classes(con)
    tables = {key: _rows(con, f"select * from {name}") for key, name in _TABLES.items()}
    modes = tables["eval_modes"]
    figures["inputs"] = [_input(store.run(run)) for run in figures["runs"]]
    stored = sum(row["num_candidates"] for row in modes)
    failed = sum(row["num_failed"] for row in modes)
    figures["failed_share"] = failed / stored if stored else 0.0
    shots = sum(row["num_fallback_shots"] for row in modes)
    figures["fallback_shots_share"] = shots / stored if stored else 0.0
    oracle = _one_row(con, "select * from oracle_gap")
    figures |= {"oracle_gap": oracle["gap"], "oracle": oracle}
    figures |= {"duplicates": _one_row(con, _DUPLICATES_SQL)}
    figures |= tables
    figures["few_annotators"] = _one_row(con, _FEW_SQL)
    figures["demonstrations"] = _one_row(con, _DEMONSTRATIONS_SQL)
    top = (
        "select * from demonstration_usage "
        f"order by num_picks desc, dataset, split, example_id limit {_TOP}"
    )
    figures["demonstrations"]["top"] = _rows(con, top)
    return figures


def _input(run: Run) -> dict[str, str]:
    """A run as an input, with the digest of its manifest, which holds those of its files."""
    manifest = run.path / MANIFEST
    return {"role": "candidates", "path": run.run, "sha256": sha256_file(manifest)}


_TOTALS_SQL = """
    select
        sum(num_candidates)::bigint as candidates,
        sum(num_fallback) / sum(num_candidates) as fallback_share,
        sum(num_unknown) / sum(num_candidates) as unknown_share,
        sum(num_candidates * mean_reward) / sum(num_candidates) as mean_reward
    from query_sums
"""
_FEW_SQL = """
    select count(*) as num_queries, count(*) filter (where len(answers) between 1 and 3) as num_few
    from query_answers
"""
_DUPLICATES_SQL = """
    select
        count(*) as num_pointers,
        coalesce(sum(num_candidates - 1), 0)::bigint as num_repeats,
        count(*) filter (where min_reward < max_reward) as num_conflicting
    from duplicate_candidates
"""
_DEMONSTRATIONS_SQL = """
    select
        count(*) as num_examples,
        count(*) filter (where is_hub) as num_hubs,
        coalesce(sum(pick_share) filter (where is_hub), 0) as hub_share
    from demonstration_usage
"""


def _classes(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    found = {
        name: (count, deviation)
        for name, count, deviation in con.execute(
            "select class, count(*), avg(sqrt(reward_variance)) from query_rewards group by class"
        ).fetchall()
    }
    classes = {name: found.get(name, (0, 0.0))[0] for name in CLASSES}
    queries = sum(classes.values())
    spread = round(found.get("mixed", (0, 0.0))[1], DECIMALS)
    return {
        "queries": queries,
        "classes": classes,
        "teachable_share": classes["mixed"] / queries,
        "mixed_deviation": spread,
    }


def _rows(con: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    con.execute(sql)
    names = [column[0] for column in con.description or ()]
    return [
        {name: _rounded(value) for name, value in zip(names, row, strict=True)}
        for row in con.fetchall()
    ]


def _one_row(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    return _rows(con, sql)[0]


def _rounded(value: object) -> object:
    """A float as it is shown; what is not finite (stored scores may be so) has no value."""
    if not isinstance(value, float):
        return value
    return round(value, DECIMALS) if math.isfinite(value) else None


def _sql() -> dict[str, str]:
    """The SELECT behind every relation shown, for people who want to run it themselves."""
    names = {
        *_TABLES.values(),
        *SHARED,
        "query_rewards",
        "source_rewards",
        "mode_rewards",
        "oracle_gap",
        "duplicate_candidates",
    }
    return {name: body(builtin()[name]) for name in sorted(names)}
