"""The page *View*: rows of any relation, filtered, sorted and paged, and the SQL that gives them.

In go a relation's name and conditions, or a SELECT of the reader's own; out come rows. The reader's
SELECT, and what reads a whole store, runs in the process of ``lever query``, with its limits.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lever_board.board import State
from lever_board.page import Content, PageRequest
from lever_data.catalog import TRAINING_COLUMNS, quote_identifier, quote_literal
from lever_data.errors import UsageError
from lever_data.relations.db import readable_errors
from lever_data.relations.forms import write
from lever_data.relations.query import write_query

ROWS = 50  # of a page
OPERATORS = {  # name in an address → (words, SQL)
    "eq": ("=", "{column} = {value}"),
    "ne": ("≠", "{column} is distinct from {value}"),
    "lt": ("<", "{column} < {value}"),
    "le": ("≤", "{column} <= {value}"),
    "gt": (">", "{column} > {value}"),
    "ge": ("≥", "{column} >= {value}"),
    "has": ("contains", "contains(lower({column}::varchar), lower({value}))"),
    "null": ("is null", "{column} is null"),
    "some": ("is not null", "{column} is not null"),
}
_KINDS = ("views", "user", "staging", "diagnostics")


def view_page(asked: PageRequest) -> Content:
    """Rows of a relation, or of the reader's own SELECT."""
    session = asked.state.session()
    name = asked.text("view", "all_candidates")
    if name not in session.relations:
        raise session.explain_missing(name)
    columns = _columns(asked.state, name)
    conditions = _conditions(asked, columns)
    own = asked.text("sql")
    number = max(asked.number("page", 1), 1)
    bare = own or select(name, conditions, columns)
    sql = own or _page_sql(bare, asked, columns, number)
    in_process = not own and session.relations[name].folder in ("views", "staging")
    found = _read(asked.state, sql) if in_process else _ask(asked.state, sql)
    total = _count(asked.state, name, conditions, columns) if in_process else None
    more = {
        "view": name,
        "relation": session.relations[name],
        "relations": _relations(asked.state),
        "columns": [(c, c) for c in columns],
        "operators": [(key, words) for key, (words, _) in OPERATORS.items()],
        "conditions": [(":".join(c), _words(c)) for c in conditions],
        "sort": asked.text("sort"),
        "order": asked.text("order", "asc"),
        "sql": sql,
        "own": own,
        "found": found,
        "keys": _keys(found["names"]),
        "total": total,
        "number": number,
        "last": -(-total // ROWS) if total is not None else 1,
        "parameters": _parameters(asked, name, conditions),
        "bare": bare,
        "train": _train(asked, name, bare, found["names"], is_plain=not own and not conditions),
    }
    title = "Your query" if own else f"View {name}"
    rows = f"{total:,}" if total is not None else f"{len(found['rows']) + found['more']:,} here"
    return Content(title, {"rows": rows}, template="view.html", more=more)


def select(name: str, conditions: Sequence[Sequence[str]], columns: Mapping[str, str]) -> str:
    """The SELECT of a relation's rows that meet every (column, operator, value)."""
    return "select *\n" + _from(name, conditions, columns)


def _from(name: str, conditions: Sequence[Sequence[str]], columns: Mapping[str, str]) -> str:
    parts = []
    for column, operator, value in conditions:
        literal = quote_literal(value)
        # a filter on a column of a type: the text is read as a value of that type
        typed = literal if operator == "has" else f"{literal}::{columns[column]}"
        form = OPERATORS[operator][1]
        parts.append(form.format(column=quote_identifier(column), value=typed))
    where = "\nwhere " + "\n    and ".join(parts) if parts else ""
    return f"from {quote_identifier(name)}{where}"


def _page_sql(bare: str, asked: PageRequest, columns: Mapping[str, str], number: int) -> str:
    sort = asked.text("sort")
    order = "desc" if asked.text("order") == "desc" else "asc"
    if sort and sort not in columns:
        raise UsageError("there is no such column", value=sort)
    by = f"\norder by {quote_identifier(sort)} {order} nulls last" if sort else ""
    skipped = f" offset {(number - 1) * ROWS}" if number > 1 else ""
    return f"{bare}{by}\nlimit {ROWS}{skipped}"


def _columns(state: State, name: str) -> dict[str, str]:
    cursor = state.session().con.cursor()
    rows = cursor.execute(f"describe {quote_identifier(name)}").fetchall()
    return {row[0]: row[1] for row in rows}


def _conditions(asked: PageRequest, columns: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Those of the address, and the one that the form adds."""
    given = [tuple([*text.split(":", 2), "", ""][:3]) for text in asked.all("where")]
    if asked.text("column"):
        given.append((asked.text("column"), asked.text("operator", "eq"), asked.text("value")))
    for column, operator, _ in given:
        if column not in columns or operator not in OPERATORS:
            raise UsageError("there is no such column or comparison", value=f"{column} {operator}")
    return [(column, operator, value) for column, operator, value in given]


def _words(condition: tuple[str, str, str]) -> str:
    column, operator, value = condition
    return f"{column} {OPERATORS[operator][0]} {value}".strip()


def _read(state: State, sql: str) -> dict[str, Any]:
    out = io.BytesIO()
    with readable_errors():
        write(state.session().con.cursor().sql(sql).to_arrow_reader(ROWS), "table", out)
    return _decoded(out)


def _ask(state: State, sql: str) -> dict[str, Any]:
    out = io.BytesIO()
    write_query(state.store.path, sql, "table", out, state.query_options())
    return _decoded(out)


def _decoded(out: io.BytesIO) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def _count(
    state: State,
    name: str,
    conditions: Sequence[Sequence[str]],
    columns: Mapping[str, str],
) -> int:
    sql = "select count(*) " + _from(name, conditions, columns)
    if sql not in state.counts:
        with readable_errors():
            state.counts[sql] = int(state.session().con.cursor().execute(sql).fetchall()[0][0])
    return state.counts[sql]


def _keys(names: Sequence[str]) -> dict[str, int]:
    """Where a row says which query it is of; empty where it does not."""
    wanted = ("dataset", "split", "query_id")
    return {n: list(names).index(n) for n in wanted} if {*wanted} <= {*names} else {}


def _relations(state: State) -> list[tuple[str, str]]:
    known = state.session().relations.values()
    found = sorted(known, key=lambda relation: (_KINDS.index(relation.folder), relation.name))
    return [(r.name, r.name if r.folder == "views" else f"{r.name} ({r.folder})") for r in found]


def _parameters(
    asked: PageRequest, name: str, conditions: Sequence[tuple[str, str, str]]
) -> dict[str, object]:
    found: dict[str, object] = {"view": name, "where": [":".join(c) for c in conditions]}
    found |= {key: asked.text(key) for key in ("sort", "order") if asked.text(key)}
    return found


def _train(
    asked: PageRequest, name: str, bare: str, columns: Sequence[str], *, is_plain: bool
) -> dict[str, str] | None:
    """The command that trains on these rows; of rows that are not a view yet, the file to make."""
    if not {*TRAINING_COLUMNS} <= {*columns}:
        return None
    store = asked.board.store.path
    view = name if is_plain else "mine"
    words = ["lever", "train", "--store", str(store), "--view", view]
    words += ["--query-embeddings", "queries.npy", "--out", "checkpoints"]
    file = "" if is_plain else str(store / "views" / "mine.sql")
    return {"command": shlex.join(words), "file": file, "sql": bare}
