"""``lever views``: the relations of a store, and the SQL behind one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .common import (
    DEFAULT_STORE,
    JsonFlag,
    RunsOption,
    SqlDirOption,
    StoreOption,
    emit_json,
    emit_table,
    notice,
)

app = typer.Typer(help="List the relations of a store, or show one's SQL.")


@app.callback(invoke_without_command=True)
def list_views(
    context: typer.Context,
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    sql_dir: SqlDirOption = None,
    json: JsonFlag = False,
) -> None:
    """List every relation with its grain and number of rows."""
    if context.invoked_subcommand is not None:
        context.obj = (store, sql_dir)
        return
    from lever_data.report.views import list_views as library

    views = library(store, runs=run, sql_dir=sql_dir)
    if json:
        emit_json([asdict(v) for v in views])
        return
    emit_table(
        ["view", "rows", "grain", "what it answers"],
        [[v.name, v.rows, v.grain, v.error or v.purpose] for v in views],
    )
    for view in views:
        if view.error:
            notice(f"broken: {view.name}: {view.error}")


@app.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The relation.")],
    store: StoreOption = DEFAULT_STORE,
    sql_dir: SqlDirOption = None,
) -> None:
    """Print the SQL of one relation."""
    from lever_data.report.views import view_sql

    before_store, before_dir = context.obj
    chosen = before_store if store == DEFAULT_STORE else store
    print(view_sql(chosen, name, sql_dir=sql_dir or before_dir), end="")
