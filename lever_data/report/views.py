"""What relations a store has: names, grain, row counts, SQL; the user's broken ones with why."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb

from lever_data import __version__
from lever_data.relations.db import identity, open_session, quote_identifier
from lever_data.report.scored import share_tables
from lever_data.store.cache import value

_LISTED = ("views", "diagnostics", "user")
_FOLDERS = (*_LISTED, "staging")  # in this order


@dataclass(frozen=True)
class ViewInfo:
    """One relation: ``rows`` is null and ``error`` says why where it cannot be computed."""

    name: str
    folder: str
    grain: str
    rows: int | None
    error: str | None
    purpose: str


def list_views(
    store: Path,
    *,
    runs: Sequence[str] = (),
    sql_dir: Path | None = None,
    folders: Sequence[str] = _LISTED,
) -> list[ViewInfo]:
    """Every relation of the store with its grain and number of rows; broken ones included."""
    session = open_session(store, runs=runs, sql_dir=sql_dir)
    con = session.con
    listed = [r for r in session.relations.values() if r.folder in folders]

    def count_all() -> dict[str, int]:
        share_tables(con)
        return {r.name: _count(con, r.name) for r in listed}

    counts: dict[str, int] = {}
    with suppress(duckdb.Error):  # runs do not change: nor do the counts of the same views
        counts = value([__version__, "views", identity(con), [r.name for r in listed]], count_all)
    found = []
    for relation in listed:
        rows, error = counts.get(relation.name), None
        if rows is None:
            try:
                rows = _count(con, relation.name)
            except duckdb.Error as problem:
                error = str(problem).strip().splitlines()[0]
        found.append(
            ViewInfo(relation.name, relation.folder, relation.grain, rows, error, relation.purpose)
        )
    found += [ViewInfo(n, "user", "", None, why, "") for n, why in session.broken.items()]
    return sorted(found, key=lambda v: (_FOLDERS.index(v.folder), v.name))


def _count(con: duckdb.DuckDBPyConnection, name: str) -> int:
    return int(con.execute(f"select count(*) from {quote_identifier(name)}").fetchall()[0][0])


def view_sql(store: Path, name: str, *, sql_dir: Path | None = None) -> str:
    """The SQL file behind a relation, header included.

    Raises:
        LeverError: no such relation, or it is broken; it names the nearest or the reason.
    """
    session = open_session(store, sql_dir=sql_dir)
    if name not in session.relations:
        raise session.explain_missing(name)
    return session.relations[name].sql
