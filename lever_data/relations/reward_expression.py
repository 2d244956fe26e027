"""A reward as the user writes it: one SQL expression over the columns of a view.

In go the text and a view; out come whether it is one expression, and the columns it refers to.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from typing import Any

import duckdb

from lever_data.catalog import quote_identifier
from lever_data.errors import UsageError


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
                    hint="for example --reward 'vqa_correct + 0.5 * vqa_gt_prob'",
                )


def _has_star(node: object) -> bool:
    """Whether ``*`` or ``columns(…)``, which may stand for several, is outside of a subquery."""
    if isinstance(node, list):
        return any(map(_has_star, node))
    if not isinstance(node, dict) or node.get("class") == "SUBQUERY":
        return False
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


def _references(node: object) -> Iterator[str]:
    """The column of ``v`` that each reference in a serialised statement may mean."""
    if isinstance(node, list):
        for below in node:
            yield from _references(below)
    elif isinstance(node, dict):
        if node.get("class") == "COLUMN_REF":
            first, *rest = node["column_names"]
            yield rest[0] if first.lower() == "v" and rest else first
        for below in node.values():
            yield from _references(below)


def not_failed(present: Container[str]) -> str:
    """The clause that leaves out failed evaluations, where a view with these columns tells."""
    return " where v.eval_failed is not true" if "eval_failed" in present else ""


def _parsed(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    row = con.cursor().execute("select json_serialize_sql(?)", [sql]).fetchall()[0]
    parsed: dict[str, Any] = json.loads(row[0])
    return parsed
