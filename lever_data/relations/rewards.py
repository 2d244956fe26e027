"""Rewards: a mode and weights, or the user's expression, become one SQL expression.

The formulas stand in ``sql/macros/reward_<mode>.sql`` and nowhere else, and so does what a mode
reads (:mod:`lever_data.reward_modes`). A macro's parameters are named after the columns it reads
and the weights of :class:`.RewardSpec`, so the call follows from the file. The expression is to be
used on a relation with the alias ``v``.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

import duckdb

from lever_data import older
from lever_data.catalog import quote_identifier, quote_literal, reward_modes
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import readable_errors
from lever_data.relations.reward_spec import RewardSpec
from lever_data.reward_modes import Read, RewardMode

# A clock in SQL is written like a column.
_CLOCKS = ("current_date", "current_time", "current_timestamp", "localtime", "localtimestamp")
# `info` lives beside the views: it is joined by the candidate's key.
_INFO = (
    "(select any_value(i.info) from candidate_info as i where i.run = v.run "
    "and i.dataset = v.dataset and i.split = v.split and i.query_id = v.query_id "
    "and i.candidate = v.candidate)"
)
_HOW_TO_GET = {
    "expected_score": "generate with an answerer that gives log-probabilities",
    "similarity": "run `lever rescore`, which fills the similarity columns",
    "correct": "score the candidates with `lever rescore` or `lever generate`",
    "score": "score the candidates with `lever rescore` or `lever generate`",
    "shot_scores": "run `lever generate --shots 1,2,…`, which scores every prefix",
    "info": "ingest InfoScore beam data, or RL data with beam scores",
    "beam_score": "ingest data with beam scores",
    "logprob_score": "ingest data with log-probabilities",
}


def with_todays_columns(
    con: duckdb.DuckDBPyConnection, views: Sequence[str], spec: RewardSpec
) -> RewardSpec:
    """The reward over today's columns, where its expression says older ones that no view has."""
    if spec.expression is None:
        return spec
    described = [con.execute(f"describe {quote_identifier(v)}").fetchall() for v in views]
    known = {row[0].lower() for rows in described for row in rows}
    expression, renamed = older.with_todays_names(spec.expression, known)
    older.tell(renamed)
    return spec.but(expression=expression) if renamed else spec


def reward_columns(spec: RewardSpec) -> list[str]:
    """The columns of the view a mode reads; empty for an expression."""
    if spec.expression is not None:
        return []
    parameters = _mode(spec.mode).parameters
    return [p for p in parameters if not _is_weight(p) and p not in ("info", "pointer")]


@dataclass(frozen=True)
class Need:
    """A value the reward reads, which counts as 0 where it is missing.

    Args:
        columns: where it comes from, each in place of the one before; or the expression itself.
        value: SQL over ``v``.
        lacking: SQL condition over ``v``: the candidate needs the value and has none.
    """

    columns: tuple[str, ...]
    value: str
    lacking: str


def reward_sql(spec: RewardSpec) -> str:
    """The reward as a SQL expression of type double over the relation ``v``, clipped.

    Raises:
        UsageError: an unknown mode, a weight out of range, or an expression that is not a single
            SQL expression.
    """
    if spec.expression is not None:
        require_expression(spec.expression)
        return f"reward_clip(cast((\n{spec.expression}\n) as double))"
    _require_weights(spec)
    arguments = ", ".join(_argument(spec, p) for p in _mode(spec.mode).parameters)
    return f"reward_clip(reward_{spec.mode}({arguments}))"


def require_scores(con: duckdb.DuckDBPyConnection, view: str, spec: RewardSpec) -> None:
    """Refuse a reward that the rows of ``view`` cannot give.

    Raises:
        LeverError: a column of the mode or of the expression is missing, or null in every row; it
            says which and how to get it.
        UsageError: every weight of the mode is 0.
    """
    name = quote_identifier(view)
    present = [row[0] for row in con.cursor().execute(f"describe {name}").fetchall()]
    needed = needs(view, spec, present)
    counts = ", ".join(f"count({need.value})" for need in needed)
    with readable_errors():
        sql = f"select count(*), {counts} from {name} as v{not_failed(present)}"
        row = con.cursor().execute(sql).fetchall()[0]
    if row[0]:
        refuse_unscored(con, view, spec, dict(zip(needed, row[1:], strict=True)))


def needs(view: str, spec: RewardSpec, present: Sequence[str]) -> list[Need]:
    """What the reward reads as the macro weighs it: of a weight of 0 it needs nothing.

    Raises:
        LeverError: the view, whose columns are ``present``, lacks one.
        UsageError: every weight of the mode is 0.
    """
    if spec.expression is not None:
        sql = reward_sql(spec)
        return [Need((spec.name,), sql, f"({sql}) is null")]
    if missing := [c for c in reward_columns(spec) if c not in present]:
        raise LeverError(
            f"the view has no column for the reward {spec.name}",
            where=view,
            value=", ".join(missing),
            hint=older.told({o: n for o, n in older.NAMES.items() if o in present and n in missing})
            or _how_to_get(missing),
        )
    mode = _mode(spec.mode)
    weighed = [read for read in mode.reads if _weight(spec, read) != 0]
    if not weighed:
        raise UsageError(
            "the reward weighs nothing: each of its weights is 0",
            value=spec.mode,
            hint=", ".join(dict.fromkeys(read.weight for read in mode.reads if read.weight)),
        )
    return [_need(spec, read) for read in weighed]


def _weight(spec: RewardSpec, read: Read) -> float:
    if read.weight is None:
        return 1.0
    weight = float(getattr(spec, read.weight))
    return 1 - weight if read.is_rest else weight


def _need(spec: RewardSpec, read: Read) -> Need:
    columns = [c for c, flag in read.columns if flag is None or getattr(spec, flag)]
    values = [_argument(spec, column) for column in columns]
    value = f"coalesce({', '.join(values)})" if len(values) > 1 else values[0]
    only = "" if read.unless is None else f" and v.{read.unless} is distinct from 1"
    return Need(tuple(columns), value, f"({value}) is null{only}")


def refuse_unscored(
    con: duckdb.DuckDBPyConnection, view: str, spec: RewardSpec, counts: Mapping[Need, int]
) -> None:
    """Refuse a reward with a need that no row has a value for.

    Raises:
        LeverError: says which column and how to get it.
    """
    empty = [column for need, found in counts.items() if not found for column in need.columns]
    if not empty:
        return
    if spec.expression is not None:
        empty = null_columns(con, view, spec.expression)
    reads = "reads a column that " if empty else ""
    raise LeverError(
        f"the reward {spec.name} {reads}is null in every row",
        where=view,
        value=", ".join(empty) or None,
        hint=_how_to_get(empty),
    )


def _how_to_get(columns: Sequence[str]) -> str | None:
    return "; ".join(f"{c}: {_HOW_TO_GET[c]}" for c in columns if c in _HOW_TO_GET) or None


def _mode(name: str) -> RewardMode:
    modes = reward_modes()
    if name not in modes:
        near = get_close_matches(name, modes, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError("unknown reward mode", value=name, hint=f"{hint}modes: {', '.join(modes)}")
    return modes[name]


def _is_weight(parameter: str) -> bool:
    return parameter in RewardSpec.model_fields


def _argument(spec: RewardSpec, parameter: str) -> str:
    if parameter == "info":
        return _INFO
    if not _is_weight(parameter):
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
    if spec.shot_weights and abs(sum(spec.shot_weights) - 1) > 1e-6:
        raise UsageError("shot weights must sum to 1", value=spec.shot_weights)
    if spec.shot_weights and "shot_weights" not in _mode(spec.mode).parameters:
        raise UsageError(
            f"the mode {spec.mode} has no shot weights",
            value=spec.shot_weights,
            hint="--reward-mode multi_shot",
        )


def prepare_reward(con: duckdb.DuckDBPyConnection, spec: RewardSpec) -> None:
    """Make ready what a mode reads besides the view; call it once per connection.

    ``info`` is looked up in ``candidate_info`` for every row: as a view over several runs that
    takes minutes for 90,000 rows, as a table half a second.
    """
    if spec.expression is not None or "info" not in _mode(spec.mode).parameters:
        return
    kind = "select 1 from duckdb_views() where view_name = 'candidate_info'"
    if con.execute(kind).fetchall():
        con.execute("create table new_candidate_info as from candidate_info")
        con.execute("drop view candidate_info")
        con.execute("alter table new_candidate_info rename to candidate_info")


def require_expression(expression: str) -> None:
    """One scalar expression and no more.

    Parsed twice: bare it must be the one item of a lone SELECT, so that a list is refused; in
    parentheses it must be that too, so that a clause after it is.

    Raises:
        UsageError: the text is anything else.
    """
    with duckdb.connect() as con:
        for text in (f"select {expression}\n", f"select (\n{expression}\n)"):
            nodes = [statement["node"] for statement in _parsed(con, text).get("statements", [])]
            if (
                len(nodes) != 1
                or len(nodes[0].get("select_list", [])) != 1
                or nodes[0]["from_table"]["type"] != "EMPTY"
                or _has_star(nodes[0]["select_list"])
            ):
                raise UsageError(
                    "the reward is not one SQL expression",
                    value=expression,
                    hint="for example --reward 'correct + 0.5 * expected_score'",
                )
            _require_steady(expression, nodes)


def _require_steady(expression: str, tree: object) -> None:
    """Refuse what may give another value each time it is asked.

    Raises:
        UsageError: it names the function.
    """
    for node in _nodes(tree):
        names = node.get("column_names") or [node.get("function_name")]
        unsteady = _CLOCKS if node.get("class") == "COLUMN_REF" else _unsteady_functions()
        if node.get("sample") is not None or (len(names) == 1 and names[0] in unsteady):
            raise UsageError(
                f"a reward is the same every time, and {names[0] or 'a sample'} is not",
                value=expression,
                hint="a reward reads stored columns; to choose candidates at random, write a view",
            )


@cache
def _unsteady_functions() -> frozenset[str]:
    """Functions of chance and of the clock; ``error`` is one only in name."""
    sql = (
        "select function_name from duckdb_functions() "
        "where stability in ('VOLATILE', 'CONSISTENT_WITHIN_QUERY') "
        "or macro_definition like '%current_timestamp%' or function_name = 'reservoir_quantile'"
    )
    with duckdb.connect() as con:
        return frozenset(name for (name,) in con.execute(sql).fetchall()) - {"error"}


def _nodes(tree: object) -> Iterator[dict[str, Any]]:
    """Every node of a serialised statement."""
    if isinstance(tree, dict):
        yield tree
    for below in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    ):
        yield from _nodes(below)


def _has_star(node: object) -> bool:
    """Whether ``columns(…)``, or outside of a subquery ``*``, which stand for several, is there."""
    if isinstance(node, list):
        return any(map(_has_star, node))
    if not isinstance(node, dict):
        return False
    if node.get("class") == "SUBQUERY":
        return any(below.get("columns") is True for below in _nodes(node))
    return node.get("class") == "STAR" or _has_star(list(node.values()))


def null_columns(con: duckdb.DuckDBPyConnection, view: str, expression: str) -> list[str]:
    """The columns of ``view`` that an expression refers to and that are null in every row."""
    name = quote_identifier(view)
    present = [row[0] for row in con.cursor().execute(f"describe {name}").fetchall()]
    parsed = _parsed(con, f"select (\n{expression}\n)")
    referred = {n.lower() for n in _references(parsed)}
    columns = [c for c in present if c.lower() in referred]
    if not columns:
        return []
    counts = ", ".join(f"count(v.{quote_identifier(c)})" for c in columns)
    sql = f"select {counts} from {name} as v{not_failed(present)}"
    row = con.cursor().execute(sql).fetchall()[0]
    return [c for c, found in zip(columns, row, strict=True) if not found]


def _references(tree: object) -> Iterator[str]:
    """The column of ``v`` that each reference in a serialised statement may mean."""
    for node in _nodes(tree):
        if node.get("class") == "COLUMN_REF":
            first, *rest = node["column_names"]
            yield rest[0] if first.lower() == "v" and rest else first


def not_failed(present: Container[str]) -> str:
    """The clause that leaves out failed evaluations, where a view with these columns tells."""
    return " where v.eval_failed is not true" if "eval_failed" in present else ""


def _parsed(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    row = con.cursor().execute("select json_serialize_sql(?)", [sql]).fetchall()[0]
    parsed: dict[str, Any] = json.loads(row[0])
    return parsed
