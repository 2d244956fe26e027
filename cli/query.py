"""``lever query``: one reading SELECT over the store."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import (
    DEFAULT_STORE,
    RunsOption,
    SqlDirOption,
    StoreOption,
    emit_table,
    notice,
)


def query(
    sql: Annotated[str | None, typer.Argument(help="The SELECT.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the SELECT from here.")] = None,
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    sql_dir: SqlDirOption = None,
    form: Annotated[
        Literal["table", "csv", "json", "parquet"], typer.Option("--format", help="Form of output.")
    ] = "table",
    out: Annotated[Path | None, typer.Option("--out", help="Write here, not to stdout.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds the query may take.")] = 300.0,
    memory: Annotated[float, typer.Option(help="Gigabytes the query may use.")] = 4.0,
) -> None:
    """Run one reading SELECT over the store's relations (`lever views` lists them).

    [bold]lever query "select gen_method, avg(vqa_correct) from all_candidates group by 1"[/bold]
    """
    from lever_data.relations.query import QueryOptions, write_query

    if out is not None:
        from lever_data.store.files import require_writable, writing

        require_writable([out])
    options = QueryOptions(runs=tuple(run), sql_dir=sql_dir, timeout=timeout, memory=_bytes(memory))
    text = _text(sql, file)
    if out is not None:
        chosen = _form_of(out) if form == "table" else form
        with writing(out) as handle:
            rows = write_query(store, text, chosen, handle, options)
        notice(f"wrote {rows:,} rows to {out}")
    elif form == "table":
        cells = io.BytesIO()
        write_query(store, text, form, cells, options)
        _show(json.loads(cells.getvalue()))
    else:
        write_query(store, text, form, sys.stdout.buffer, options)
        sys.stdout.buffer.flush()


def _bytes(gigabytes: float) -> int:
    from lever_data.errors import UsageError

    if not 0 < gigabytes < 1e6:
        raise UsageError("--memory must be a positive number of gigabytes", value=gigabytes)
    return int(gigabytes * 1e9)


def _text(sql: str | None, file: Path | None) -> str:
    from lever_data.errors import LeverError, UsageError

    if (sql is None) == (file is None):
        what = "is given twice" if sql is not None else "is missing"
        raise UsageError(f"the SELECT {what}", hint="an argument, or --file")
    if sql is not None:
        return sql
    assert file is not None
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LeverError(f"the SQL file cannot be read ({error})", where=str(file)) from error


def _form_of(out: Path) -> str:
    from lever_data.errors import UsageError

    form = out.suffix.removeprefix(".")
    if form not in ("csv", "json", "parquet"):
        raise UsageError("the name of --out does not say its form", value=str(out), hint="--format")
    return form


def _show(found: dict[str, Any]) -> None:
    emit_table(found["names"], found["rows"])
    if found["more"]:
        notice(f"… and {found['more']:,} more rows; --format csv, json or parquet gives all")
