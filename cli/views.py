"""``lever views``: the relations of a store, and the SQL behind one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lever_data.options import words
from lever_data.vocabulary import DEFAULT_STORE, JsonFile, RunNames, SqlDir, StorePath

from .common import emit, emit_table, notice
from .flags import with_flags
from .help import Group, Help

app = typer.Typer(help="List the relations of a store, or show one's SQL.", cls=Group)


@app.callback(invoke_without_command=True)
@with_flags
def list_views(
    context: typer.Context,
    store: StorePath = DEFAULT_STORE,
    runs: RunNames = (),
    sql_dir: SqlDir = None,
    json: JsonFile = None,
) -> None:
    """List every relation with its grain and number of rows."""
    if context.invoked_subcommand is not None:
        context.obj = (store, sql_dir)
        return
    from lever_data.report.views import list_views as library

    views = library(store, runs=runs, sql_dir=sql_dir)
    if emit([asdict(v) for v in views], json):
        return
    emit_table(
        ["view", "rows", "grain", "what it answers"],
        [[v.name, v.rows, v.grain, v.error or v.purpose] for v in views],
    )
    for view in views:
        if view.error:
            notice(f"broken: {view.name}: {view.error}")


@app.command(cls=Help)
@with_flags
def show(
    context: typer.Context,
    name: Annotated[str, words("The relation.", argument=True)],
    store: StorePath = DEFAULT_STORE,
    sql_dir: SqlDir = None,
) -> None:
    """Print the SQL of one relation."""
    from lever_data.report.views import view_sql

    before_store, before_dir = context.obj
    chosen = before_store if store == DEFAULT_STORE else store
    print(view_sql(chosen, name, sql_dir=sql_dir or before_dir), end="")
