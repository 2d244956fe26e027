"""Point the diagnostics at the view and reward that an audit asks for.

In go a session with the view, and an :class:`AuditRequest`; afterwards the diagnostics stand in a
schema of their own, before those of the session, answer for the chosen view and reward, and what
several of them share is a table in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import duckdb

from lever_data.catalog import (
    TRAINING_COLUMNS,
    Relation,
    body,
    builtin,
    builtin_reads,
    documented_columns,
    in_order,
    quote_identifier,
    quote_literal,
    reward_modes,
)
from lever_data.errors import LeverError
from lever_data.relations.db import Session, empty_view
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import (
    needs,
    prepare_reward,
    refuse_unscored,
    reward_sql,
)
from lever_data.report.options import AuditRequest

DECIMALS = 10  # sums of doubles differ in the last digits between runs of many threads

SHARED = (  # read by several diagnostics
    "scores",
    "query_sums",
    "scored_places",
    "reward_by_source",
    "scored_sample",
    "query_answers",
    "demonstration_usage",
)
_ENCODED = ("dataset", "split", "gen_method", "eval_mode")  # few values: half the time as enums
_LEARNT = (*_ENCODED, "run", "scorer")

_POLICY_COLUMNS = {
    "dataset": "varchar",
    "split": "varchar",
    "query_id": "bigint",
    "pointer": "integer[]",
    "logprob": "double",
}


@dataclass(frozen=True)
class Survey:
    """What one look at the view tells: the few values of texts, and the share without a score."""

    levels: dict[str, list[str]]
    missing_share: float


def diagnostics() -> dict[str, Relation]:
    """The relations an audit is made of."""
    return {r.name: r for r in builtin().values() if r.folder == "diagnostics"}


def read_by_diagnostics() -> set[str]:
    """The other relations they read."""
    names = diagnostics().keys()
    return {read for name in names for read in builtin_reads(name)} - names


def share_tables(con: duckdb.DuckDBPyConnection) -> None:
    """Make what several diagnostics share tables in memory, for who reads all of them.

    They hide the views of the session; one that cannot be computed stays a view, which says why.
    """
    con.execute("create schema shared")
    con.execute("set schema = 'shared'")
    for relation in in_order(diagnostics()):
        kind = "table" if relation.name in SHARED else "view"
        with suppress(duckdb.Error):
            con.execute(f"create {kind} {relation.name} as {body(relation)}")


def define_diagnostics(session: Session, request: AuditRequest) -> tuple[Survey, str]:
    """Define the diagnostics over the chosen view, reward and policy.

    They hide those of the session, which a view of the user's may read.

    Returns what a look at the view told (a reward that lacks a score counts as 0), and the SELECT
    behind ``scored``.

    Raises:
        LeverError: the view is empty or lacks a training column, or the reward cannot be computed.
    """
    con, view = session.con, quote_identifier(request.view)
    present = [row[0] for row in con.execute(f"describe {view}").fetchall()]
    if missing := [c for c in TRAINING_COLUMNS if c not in present]:
        raise LeverError(
            "the view is not made for training: it has no column " + ", ".join(missing),
            where=request.view,
            hint="a view to audit or train on has the columns " + ", ".join(TRAINING_COLUMNS),
        )
    survey = _survey(con, request, present)
    policy = None if request.policy is None else _policy_sql(con, request.policy)
    con.execute("create schema audit")
    con.execute("set schema = 'audit'")
    scored = _scored_sql(request, present)
    con.execute(f"create view scored as {scored}")
    encoded = _encoded_scores_sql(con, survey)
    from lever_data.report.sums import put_sums  # here: not before an audit that is not remembered

    if put_sums(con, "audit", {name: survey.levels[name] for name in _ENCODED}):
        con.execute(f"create view scores as {encoded}")
    else:
        con.execute(f"create table scores as {encoded}")
        _require_finite(con, request)
        con.execute(f"create table query_sums as {body(builtin()['query_sums'])}")
    places = "select distinct dataset::varchar as dataset, split::varchar as split from query_sums"
    con.execute(f"create table scored_places as {places} order by all")
    put_settings(con, request.reward)
    if policy is not None:
        con.execute(f"create view policy_logprobs as {policy}")
    there = {name for (name,) in con.execute(_DEFINED_SQL).fetchall()}
    for relation in in_order(diagnostics()):
        if relation.name not in there:
            kind = "table" if relation.name in SHARED else "view"
            con.execute(f"create {kind} {relation.name} as {body(relation)}")
    return survey, scored


_DEFINED_SQL = "select table_name from information_schema.tables where table_schema = 'audit'"


def _policy_sql(con: duckdb.DuckDBPyConnection, policy: str) -> str:
    name = quote_identifier(policy)
    present = [row[0] for row in con.execute(f"describe {name}").fetchall()]
    if missing := [c for c in _POLICY_COLUMNS if c not in present]:
        raise LeverError(
            "the policy has no column " + ", ".join(missing),
            where=policy,
            hint=f"a policy is a relation with {', '.join(_POLICY_COLUMNS)}; for example a view "
            "that renames: select …, logprob_score as logprob from …",
        )
    listed = ", ".join(f"{c}::{kind} as {c}" for c, kind in _POLICY_COLUMNS.items())
    return f"select {listed} from main.{name}"


def _survey(
    con: duckdb.DuckDBPyConnection, request: AuditRequest, present: Sequence[str]
) -> Survey:
    """Look at the view once; refuse it where it is empty or has nothing to reward."""
    prepare_reward(con, request.reward)
    needed = needs(request.view, request.reward, present)
    lacking = " or ".join(f"({need.lacking})" for need in needed)
    wanted = [
        "count(*)",
        f"count(*) filter (where {lacking})",
        *(f"count({need.value})" for need in needed),
        *(
            f"list_sort(list(distinct v.{name}))" if name in present else "null::varchar[]"
            for name in _LEARNT
        ),
    ]
    try:
        row = con.execute(
            f"select {', '.join(wanted)} from {quote_identifier(request.view)} as v "
            "where v.eval_failed is not true"
        ).fetchall()[0]
    except duckdb.Error as error:
        raise LeverError(
            "the reward cannot be computed over this view: " + str(error).splitlines()[0],
            where=request.view,
            value=request.reward.name,
            hint="its columns: " + ", ".join(present),
        ) from error
    if not row[0]:
        hint = "`lever views` counts the rows of every view, `lever runs` lists what is stored"
        raise empty_view(con, request.view, "the view holds no candidates", hint)
    counts = dict(zip(needed, row[2:], strict=False))
    refuse_unscored(con, request.view, request.reward, counts)
    levels = {
        name: [value for value in values or () if value is not None]
        for name, values in zip(_LEARNT, row[-len(_LEARNT) :], strict=True)
    }
    return Survey(levels, round(row[1] / row[0], DECIMALS))


def _scored_sql(request: AuditRequest, present: Sequence[str]) -> str:
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
    return f"select\n    {listed}\nfrom main.{view} as v\nwhere v.eval_failed is not true"


def _require_finite(con: duckdb.DuckDBPyConnection, request: AuditRequest) -> None:
    """Refuse what training refuses: every figure over such a reward would be none."""
    count, query, value = con.execute(
        "select count(*), min(query_id), arg_min(reward, query_id) from scores "
        "where not isfinite(reward)"
    ).fetchall()[0]
    if count:
        raise LeverError(
            f"a reward is not a finite number, in {count:,} candidates of the view",
            where=f"{request.view}, query {query}",
            value=value,
            hint=f"the reward is {request.reward.name}; divide by nullif(…, 0), and a reward that "
            "is then missing counts as 0",
        )


def _encoded_scores_sql(con: duckdb.DuckDBPyConnection, survey: Survey) -> str:
    """``scores`` with its texts as enums: a quarter of the memory, half the time to group."""
    types = {}
    for column in _ENCODED:
        if values := survey.levels[column]:
            types[column] = f"{column}_level"
            texts = ", ".join(map(quote_literal, values))
            con.execute(f"create type {types[column]} as enum ({texts})")
    columns = [
        f"{c.name}::{types[c.name]} as {c.name}" if c.name in types else c.name
        for c in documented_columns(builtin()["scores"])
    ]
    return f"select {', '.join(columns)} from scored"


def put_settings(con: duckdb.DuckDBPyConnection, reward: RewardSpec) -> None:
    """One row of weights for the diagnostics that compare modes, and the mode's maximum."""
    values = {
        "reward_name": reward.name,
        "is_expression": reward.expression is not None,
        "max_reward": None,
    }
    columns = documented_columns(builtin()["audit_settings"])
    given = [values.get(c.name, getattr(reward, c.name, None)) for c in columns]
    listed = ", ".join(f"?::{c.type} as {c.name}" for c in columns)
    given = [list(value) if isinstance(value, tuple) else value for value in given]
    con.execute(f"create table audit_settings as select {listed}", given)
    con.execute("update audit_settings set max_reward = ?", [_largest_reward(con, reward)])


def _largest_reward(con: duckdb.DuckDBPyConnection, reward: RewardSpec) -> float | None:
    """The largest reward the mode can give at its weights, in [-5, 5].

    An expression of the user's, and a mode without a bound, have no maximum of their own: theirs is
    the largest reward in the relation ``query_sums``, and ``None`` where all are equal there: then
    nothing says whether that is right or just tied.
    """
    largest = None if reward.expression is not None else reward_modes()[reward.mode].largest
    if largest is None:
        sql = "select max(max_reward) from query_sums having min(min_reward) < max(max_reward)"
    else:
        sql = f"select reward_clip({largest}) from audit_settings"
    rows = con.execute(sql).fetchall()
    return float(rows[0][0]) if rows else None
