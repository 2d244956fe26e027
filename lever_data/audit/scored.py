"""Put the view and reward that an audit asks for in the place of the relation ``scored``.

In go a session with lever's relations and an :class:`AuditRequest`; afterwards every diagnostic
answers for the chosen view and reward, and what several of them share is a table in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from lever_data.audit.reward import largest_reward
from lever_data.catalog import body, builtin, documented_columns, quote_identifier, quote_literal
from lever_data.db import Session
from lever_data.errors import LeverError
from lever_data.reward_spec import RewardSpec
from lever_data.rewards import needs, prepare_reward, refuse_unscored, reward_sql
from lever_data.selection import TRAINING_COLUMNS

DECIMALS = 10  # sums of doubles differ in the last digits between runs of many threads

# Built in this order; each is read by several diagnostics.
SHARED = (
    "scores",
    "query_rewards",
    "source_rewards",
    "reward_by_source",
    "scored_sample",
    "demonstration_usage",
)
_ENCODED = ("dataset", "split", "gen_method", "eval_mode")  # few values: half the time as enums

_POLICY_COLUMNS = {
    "dataset": "varchar",
    "split": "varchar",
    "query_id": "bigint",
    "pointer": "integer[]",
    "logprob": "double",
}


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
class _Survey:
    """What one look at the view tells: the few values of texts, and the share without a score."""

    levels: dict[str, list[str]]
    missing_share: float


def put_scored(session: Session, request: AuditRequest) -> float:
    """Put the chosen view and reward in the place of ``scored``, and the policy in its own.

    Returns the share of the candidates whose reward lacks a score, which counts as 0.

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
    con.execute(f"create or replace view scored as {_scored_sql(request, present)}")
    if request.policy is not None:
        _put_policy(con, request.policy)
    _build_shared(con, survey, request)
    return survey.missing_share


def _put_policy(con: duckdb.DuckDBPyConnection, policy: str) -> None:
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
    con.execute(f"create or replace view policy_logprobs as select {listed} from {name}")


def _survey(
    con: duckdb.DuckDBPyConnection, request: AuditRequest, present: Sequence[str]
) -> _Survey:
    """Look at the view once; refuse it where it is empty or has nothing to reward."""
    prepare_reward(con, request.reward)
    needed = needs(request.view, request.reward, present)
    lacking = " or ".join(f"({need.lacking})" for need in needed)
    wanted = [
        "count(*)",
        f"count(*) filter (where {lacking})",
        *(f"count({need.value})" for need in needed),
        *(f"list_sort(list(distinct v.{name}))" for name in _ENCODED),
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
        raise LeverError(
            "the view holds no candidates",
            where=request.view,
            hint="`lever views` counts the rows of every view, `lever runs` lists what is stored",
        )
    counts = dict(zip(needed, row[2:], strict=False))
    refuse_unscored(con, request.view, request.reward, counts)
    levels = {
        name: [value for value in values or () if value is not None]
        for name, values in zip(_ENCODED, row[-len(_ENCODED) :], strict=True)
    }
    return _Survey(levels, round(row[1] / row[0], DECIMALS))


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
    return f"select\n    {listed}\nfrom {view} as v\nwhere v.eval_failed is not true"


def _build_shared(con: duckdb.DuckDBPyConnection, survey: _Survey, request: AuditRequest) -> None:
    """Turn the relations that several diagnostics read from views into tables."""
    for name in SHARED:
        sql = _encoded_scores_sql(con, survey) if name == "scores" else body(builtin()[name])
        _replace_by_table(con, name, sql)
        if name == "scores":
            _require_finite(con, request)
            _put_settings(con, request.reward)


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


def _replace_by_table(
    con: duckdb.DuckDBPyConnection, name: str, sql: str, values: Sequence[object] = ()
) -> None:
    con.execute(f'create table "new {name}" as {sql}', list(values))
    con.execute(f"drop view {quote_identifier(name)}")
    con.execute(f'alter table "new {name}" rename to {quote_identifier(name)}')


def _encoded_scores_sql(con: duckdb.DuckDBPyConnection, survey: _Survey) -> str:
    """``scores`` with its texts as enums: a quarter of the memory, half the time to group."""
    types = {}
    for column, values in survey.levels.items():
        if values:
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
    values = {
        "reward_name": reward.name,
        "is_expression": reward.expression is not None,
        "max_reward": largest_reward(con, reward),
    }
    columns = documented_columns(builtin()["audit_settings"])
    given = [values.get(c.name, getattr(reward, c.name, None)) for c in columns]
    listed = ", ".join(f"?::{c.type} as {c.name}" for c in columns)
    given = [list(value) if isinstance(value, tuple) else value for value in given]
    _replace_by_table(con, "audit_settings", f"select {listed}", given)
