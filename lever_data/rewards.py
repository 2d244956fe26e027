"""Rewards: a mode and weights, or the user's expression, become one SQL expression.

The formulas stand in ``sql/macros/reward_<mode>.sql`` and nowhere else. A macro's parameters are
named after the columns it reads and the weights of :class:`.RewardSpec`, so the call follows from
the file. The expression is to be used on a relation with the alias ``v``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches

import duckdb

from lever_data.catalog import macros, quote_identifier, quote_literal
from lever_data.errors import LeverError, UsageError
from lever_data.reward_spec import RewardSpec

LIMIT = 5.0  # rewards are clipped to [-LIMIT, LIMIT], as in the legacy trainer
_PARAMETERS = re.compile(r"create or replace macro \w+\((.*?)\)\s+as", re.DOTALL)
# The mode hybrid reads `info`, which lives beside the views: joined by the candidate's key.
_INFO = (
    "(select any_value(i.info) from candidate_info as i where i.run = v.run "
    "and i.dataset = v.dataset and i.split = v.split and i.query_id = v.query_id "
    "and i.candidate = v.candidate)"
)
_HOW_TO_GET = {
    "vqa_gt_prob": "generate with an answerer that gives log-probabilities",
    "vqa_rel_score": "run `lever rescore`, which fills the similarity columns",
    "vqa_correct": "score the candidates with `lever rescore` or `lever generate`",
    "vqa_acc_score": "score the candidates with `lever rescore` or `lever generate`",
    "shot_scores": "run `lever generate --shots 1,2,…`, which scores every prefix",
    "beam_score": "ingest data with beam scores",
    "logprob_score": "ingest data with log-probabilities",
}


def modes() -> list[str]:
    """The reward modes: the stems of ``sql/macros/reward_*.sql`` that are one."""
    names = [m.removeprefix("reward_") for m in macros() if m.startswith("reward_")]
    return [name for name in names if name != "clip"]


def reward_columns(spec: RewardSpec) -> list[str]:
    """The columns of the view a mode reads; empty for an expression."""
    if spec.expression is not None:
        return []
    weights = {f.name for f in fields(RewardSpec)}
    return [p for p in _parameters(spec.mode) if p not in weights and p not in ("info", "pointer")]


def reward_sql(spec: RewardSpec) -> str:
    """The reward as a SQL expression of type double over the relation ``v``, clipped.

    Raises:
        UsageError: an unknown mode, a weight out of range, or an expression that is no single
            SQL expression.
    """
    if spec.expression is not None:
        _require_expression(spec.expression)
        return f"reward_clip(cast((\n{spec.expression}\n) as double))"
    _require_weights(spec)
    arguments = ", ".join(_argument(spec, p) for p in _parameters(spec.mode))
    return f"reward_clip(reward_{spec.mode}({arguments}))"


def require_scores(con: duckdb.DuckDBPyConnection, view: str, spec: RewardSpec) -> None:
    """Refuse a reward that the rows of ``view`` cannot give.

    Raises:
        LeverError: a column of the mode is missing, or null in every row; it says which and how
            to get it. For an expression: it is null in every row.
    """
    cursor = con.cursor()
    name = quote_identifier(view)
    present = {r[0] for r in cursor.execute(f"describe {name}").fetchall()}
    tested = scores_read(view, spec, present)
    counts = ", ".join(f"count({sql})" for sql in tested.values())
    row = cursor.execute(f"select count(*), {counts} from {name} as v").fetchall()[0]
    if row[0]:
        refuse_unscored(view, spec, dict(zip(tested, row[1:], strict=True)))


def scores_read(view: str, spec: RewardSpec, present: Container[str]) -> dict[str, str]:
    """What must not be null throughout: each column a mode reads, or the expression, as SQL.

    Raises:
        LeverError: the view has no such column.
    """
    columns = reward_columns(spec)
    if missing := [c for c in columns if c not in present]:
        raise LeverError(
            f"the view has no column for the reward {spec.name}",
            where=view,
            value=", ".join(missing),
            hint=_how_to_get(missing),
        )
    return {c: f"v.{quote_identifier(c)}" for c in columns} or {spec.name: reward_sql(spec)}


def refuse_unscored(view: str, spec: RewardSpec, counts: Mapping[str, int]) -> None:
    """Refuse a reward with a column (key of ``counts``) that no row has a value for.

    Raises:
        LeverError: says which column and how to get it.
    """
    if empty := [column for column, found in counts.items() if not found]:
        raise LeverError(
            f"the reward {spec.name} reads a column that is null in every row",
            where=view,
            value=", ".join(empty),
            hint=_how_to_get(empty),
        )


def _how_to_get(columns: Sequence[str]) -> str | None:
    return "; ".join(f"{c}: {_HOW_TO_GET[c]}" for c in columns if c in _HOW_TO_GET) or None


def _parameters(mode: str) -> list[str]:
    if mode not in modes():
        near = get_close_matches(mode, modes(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            "unknown reward mode", value=mode, hint=f"{hint}modes: {', '.join(modes())}"
        )
    match = _PARAMETERS.search(macros()[f"reward_{mode}"])
    if match is None:
        raise AssertionError(f"reward_{mode}.sql does not open with create or replace macro")
    return [p.strip() for p in match.group(1).split(",")]


def _argument(spec: RewardSpec, parameter: str) -> str:
    if parameter == "info":
        return _INFO
    if parameter not in {f.name for f in fields(RewardSpec)}:
        return f"v.{quote_identifier(parameter)}"
    value = getattr(spec, parameter)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quote_literal(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(f'{w!r}::double' for w in value)}]::double[]"
    return f"{float(value)!r}::double"


def _require_weights(spec: RewardSpec) -> None:
    if spec.correctness_mode not in ("01", "pm1"):
        raise UsageError("correctness_mode is 01 or pm1", value=spec.correctness_mode)
    if not 0 <= spec.hybrid_alpha <= 1:
        raise UsageError("hybrid_alpha lies between 0 and 1", value=spec.hybrid_alpha)
    if spec.shot_weights and abs(sum(spec.shot_weights) - 1) > 1e-6:
        raise UsageError("shot weights must sum to 1", value=spec.shot_weights)


def _require_expression(expression: str) -> None:
    """One scalar expression and no more.

    Parsed twice: bare it must be the one item of a lone SELECT, so that a list is refused; in
    parentheses it must be that too, so that a clause after it is.
    """
    with duckdb.connect() as con:
        for text in (f"select {expression}\n", f"select (\n{expression}\n)"):
            parsed = json.loads(
                con.execute("select json_serialize_sql(?)", [text]).fetchall()[0][0]
            )
            nodes = [statement["node"] for statement in parsed.get("statements", [])]
            if (
                len(nodes) != 1
                or len(nodes[0].get("select_list", [])) != 1
                or nodes[0]["from_table"]["type"] != "EMPTY"
            ):
                raise UsageError(
                    "the reward is not one SQL expression",
                    value=expression,
                    hint="for example --reward 'vqa_correct + 0.5 * vqa_gt_prob'",
                )


def prepare_reward(con: duckdb.DuckDBPyConnection, spec: RewardSpec) -> None:
    """Make ready what a mode reads besides the view; call it once per connection.

    ``hybrid`` looks up ``candidate_info`` for every row: as a view over several runs that takes
    minutes for 90,000 rows, as a table half a second.
    """
    if spec.expression is not None or spec.mode != "hybrid":
        return
    kind = "select 1 from duckdb_views() where view_name = 'candidate_info'"
    if con.execute(kind).fetchall():
        con.execute("create table new_candidate_info as from candidate_info")
        con.execute("drop view candidate_info")
        con.execute("alter table new_candidate_info rename to candidate_info")
