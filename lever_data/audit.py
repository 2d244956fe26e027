"""Audit a view before training: which queries can teach, and which rewards are noise.

In go a store and an :class:`AuditRequest`; out comes an :class:`Audit`: figures with stable keys,
and the SQL behind each. Every figure is a query over ``sql/diagnostics``; this module puts the
chosen view and reward in the place of the relation ``scored`` and keeps what several diagnostics
share in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb

from lever_data.audit_reward import largest_reward
from lever_data.catalog import body, builtin, documented_columns, quote_identifier, quote_literal
from lever_data.db import Session, open_session
from lever_data.errors import LeverError
from lever_data.rewards import (
    RewardSpec,
    prepare_reward,
    require_scores,
    reward_columns,
    reward_sql,
)
from lever_data.selection import TRAINING_COLUMNS
from lever_data.store import Store

MEMORY_LIMIT = "3GB"  # DuckDB's; beyond it, it spills to disk
DECIMALS = 10  # sums of doubles differ in the last digits between runs of many threads

# Built in this order; each is read by several diagnostics.
_SHARED = ("scores", "query_rewards", "source_rewards", "reward_by_source", "scored_sample")
_ENCODED = ("dataset", "split", "gen_method", "eval_mode")  # few values: half the time as enums
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
_ALONE = ("oracle_gap", "duplicate_candidates", "demonstration_usage")  # shown in part
CLASSES = ("mixed", "all_wrong", "all_right", "tied")
_TOP = 10  # demonstrations listed


@dataclass(frozen=True)
class AuditRequest:
    """What to audit.

    Args:
        view: a relation with the training columns.
        reward: the reward.
        runs: only these runs; all where empty.
        scorer: only candidates this model answered, or whose model is not known.
        sql_dir: a folder of the user's own views.
        policy: a relation with dataset, split, query_id, pointer, logprob: the policy that the
            importance weights ask about; the stored one at temperature 1 where ``None``.
    """

    view: str = "all_candidates"
    reward: RewardSpec = field(default_factory=RewardSpec)
    runs: tuple[str, ...] = ()
    scorer: str | None = None
    sql_dir: Path | None = None
    policy: str | None = None


@dataclass(frozen=True)
class Audit:
    """Figures with stable keys (shares are fractions), and the SQL of every relation used."""

    figures: dict[str, Any]
    sql: dict[str, str]


def audit(store: Store, request: AuditRequest) -> Audit:
    """Audit one view.

    Raises:
        LeverError: the store has no runs, the view is unknown, empty or lacks a training column,
            or the reward cannot be computed from its columns.
    """
    if not store.runs():
        raise LeverError(
            "the store has no runs yet, so there is nothing to audit",
            where=str(store.path),
            hint="bring RL data in first: `lever ingest rl_data.json --store DIR`",
        )
    session = _open(store, request)
    try:
        _put_request(session, request)
        _build_shared(session.con, request.reward)
        return Audit(_figures(session.con, store, request), _sql(session.con, request))
    except duckdb.Error as error:
        raise LeverError(
            f"the audit's SQL failed over this view: {str(error).splitlines()[0]}",
            where=request.view,
            hint=f"`lever query 'select * from {request.view} limit 5'` shows what it holds",
        ) from error
    finally:
        session.con.close()


def audit_views(store: Store | Path, request: AuditRequest, views: Sequence[str]) -> list[Audit]:
    """The same audit of several views, to set them side by side."""
    opened = store if isinstance(store, Store) else Store.open(store)
    return [audit(opened, replace(request, view=view)) for view in views]


def _open(store: Store, request: AuditRequest) -> Session:
    diagnostics = [r.name for r in builtin().values() if r.folder == "diagnostics"]
    wanted = [request.view, *diagnostics, *([request.policy] if request.policy else [])]
    session = open_session(
        store, runs=request.runs, scorer=request.scorer, sql_dir=request.sql_dir, only=wanted
    )
    for name in [request.view, *([request.policy] if request.policy else [])]:
        if name not in session.relations:
            session.con.close()
            raise session.explain_missing(name)
    session.con.execute("set memory_limit = ?", [MEMORY_LIMIT])
    return session


def _put_request(session: Session, request: AuditRequest) -> None:
    """Put the chosen view and reward in the place of ``scored``, and the policy in its own."""
    con, view = session.con, quote_identifier(request.view)
    present = [row[0] for row in con.execute(f"describe {view}").fetchall()]
    if missing := [c for c in TRAINING_COLUMNS if c not in present]:
        raise LeverError(
            "the view is not made for training: it has no column " + ", ".join(missing),
            where=request.view,
            hint="a view to audit or train on has the columns " + ", ".join(TRAINING_COLUMNS),
        )
    if not con.execute(f"select 1 from {view} limit 1").fetchall():
        raise LeverError(
            "the view holds no candidates",
            where=request.view,
            hint="`lever views` counts the rows of every view, `lever runs` lists what is stored",
        )
    con.execute(f"create or replace view scored as {_scored_sql(con, request, present)}")
    if request.policy is not None:
        con.execute(
            "create or replace view policy_logprobs as "
            "select dataset, split, query_id, pointer, logprob::double as logprob "
            f"from {quote_identifier(request.policy)}"
        )


def _scored_sql(
    con: duckdb.DuckDBPyConnection, request: AuditRequest, present: Sequence[str]
) -> str:
    prepare_reward(con, request.reward)
    try:
        require_scores(con, request.view, request.reward)
    except duckdb.Error as error:
        raise LeverError(
            "the reward cannot be computed over this view: " + str(error).splitlines()[0],
            where=request.view,
            value=request.reward.name,
            hint="its columns: " + ", ".join(present),
        ) from error
    columns = []
    for column in documented_columns(builtin()["scored"]):
        if column.name == "reward":
            columns.append(f"coalesce({reward_sql(request.reward)}, 0) as reward")
        elif column.name in present:
            columns.append(f"v.{column.name}::{column.type} as {column.name}")
        elif column.name == "shot_num":
            columns.append("len(v.pointer)::tinyint as shot_num")
        else:
            columns.append(f"null::{column.type} as {column.name}")
    listed = ",\n    ".join(columns)
    view = quote_identifier(request.view)
    return f"select\n    {listed}\nfrom {view} as v\nwhere v.eval_failed is not true"


def _build_shared(con: duckdb.DuckDBPyConnection, reward: RewardSpec) -> None:
    """Turn the relations that several diagnostics read from views into tables."""
    for name in _SHARED:
        sql = _encoded_scores_sql(con) if name == "scores" else body(builtin()[name])
        _replace_by_table(con, name, sql)
        if name == "scores":
            _put_settings(con, reward)


def _replace_by_table(
    con: duckdb.DuckDBPyConnection, name: str, sql: str, values: Sequence[object] = ()
) -> None:
    con.execute(f'create table "new {name}" as {sql}', list(values))
    con.execute(f"drop view {quote_identifier(name)}")
    con.execute(f'alter table "new {name}" rename to {quote_identifier(name)}')


def _encoded_scores_sql(con: duckdb.DuckDBPyConnection) -> str:
    """``scores`` with its texts as enums: a quarter of the memory, half the time to group."""
    listed = ", ".join(f"list_sort(list(distinct {c}))" for c in _ENCODED)
    levels = con.execute(f"select {listed} from scored").fetchall()[0]
    types = {}
    for column, values in zip(_ENCODED, levels, strict=True):
        if values := [v for v in values or () if v is not None]:
            types[column] = f"{column}_level"
            texts = ", ".join(map(quote_literal, values))
            con.execute(f"create type {types[column]} as enum ({texts})")
    columns = [
        f"{c.name}::{types[c.name]} as {c.name}" if c.name in types else c.name
        for c in documented_columns(builtin()["scores"])
    ]
    return f"select {', '.join(columns)} from scored"


def _put_settings(con: duckdb.DuckDBPyConnection, reward: RewardSpec) -> None:
    """One row of weights for the diagnostics that compare modes, and the mode's maximum."""
    values = {"reward_name": reward.name, "max_reward": largest_reward(con, reward)}
    columns = documented_columns(builtin()["audit_settings"])
    given = [values.get(c.name, getattr(reward, c.name, None)) for c in columns]
    listed = ", ".join(f"?::{c.type} as {c.name}" for c in columns)
    given = [list(value) if isinstance(value, tuple) else value for value in given]
    _replace_by_table(con, "audit_settings", f"select {listed}", given)


def _figures(con: duckdb.DuckDBPyConnection, store: Store, request: AuditRequest) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "view": request.view,
        "reward_mode": "expression" if request.reward.expression else request.reward.mode,
        "reward": request.reward.name,
        "runs": [run.run for run in store.select(list(request.runs))],
    }
    figures |= _one_row(con, _TOTALS_SQL) | _classes(con)
    figures["missing_share"] = _missing_share(con, request)
    tables = {key: _rows(con, f"select * from {name}") for key, name in _TABLES.items()}
    modes = tables["eval_modes"]
    stored = sum(row["num_candidates"] for row in modes)
    failed = sum(row["num_failed"] for row in modes)
    figures["failed_share"] = failed / stored if stored else 0.0
    oracle = _one_row(con, "select * from oracle_gap")
    figures |= {"oracle_gap": oracle["gap"], "oracle": oracle}
    figures |= {"duplicates": _one_row(con, _DUPLICATES_SQL)}
    figures |= tables
    figures["demonstrations"] = _one_row(con, _DEMONSTRATIONS_SQL)
    top = f"select * from demonstration_usage limit {_TOP}"
    figures["demonstrations"]["top"] = _rows(con, top)
    return figures


_TOTALS_SQL = """
    select
        count(*) as candidates,
        count(*) filter (where eval_mode = 'fallback') / count(*) as fallback_share,
        count(*) filter (where eval_mode is null) / count(*) as unknown_share,
        avg(reward) as mean_reward
    from scores
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


def _missing_share(con: duckdb.DuckDBPyConnection, request: AuditRequest) -> float:
    """Share of the candidates whose reward lacks a score, which counts as 0."""
    columns = [f"v.{quote_identifier(c)}" for c in reward_columns(request.reward)]
    lacking = [f"{sql} is null" for sql in columns or [f"({reward_sql(request.reward)})"]]
    row = con.execute(
        f"select count(*) filter (where {' or '.join(lacking)}) / count(*) "
        f"from {quote_identifier(request.view)} as v where v.eval_failed is not true"
    ).fetchall()[0]
    return round(float(row[0]), DECIMALS)


def _rows(con: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    cursor = con.cursor()
    cursor.execute(sql)
    names = [column[0] for column in cursor.description or ()]
    return [
        {name: _rounded(value) for name, value in zip(names, row, strict=True)}
        for row in cursor.fetchall()
    ]


def _one_row(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    return _rows(con, sql)[0]


def _rounded(value: object) -> object:
    return round(value, DECIMALS) if isinstance(value, float) else value


def _sql(con: duckdb.DuckDBPyConnection, request: AuditRequest) -> dict[str, str]:
    """The SELECT behind every relation shown, for people who want to run it themselves."""
    names = {
        *_TABLES.values(),
        *_SHARED,
        "oracle_gap",
        "duplicate_candidates",
        "demonstration_usage",
    }
    texts = {name: body(builtin()[name]) for name in sorted(names)}
    scored = con.execute("select sql from duckdb_views() where view_name = 'scored'").fetchall()
    return {"scored": scored[0][0], **texts}
