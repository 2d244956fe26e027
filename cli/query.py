"""``lever query``: one reading SELECT over the store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .common import (
    DEFAULT_STORE,
    RunsOption,
    SqlDirOption,
    StoreOption,
    emit_table,
    notice,
)

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 200  # rows a table shows; the other formats give all


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
    from lever_data.relations.query import QueryOptions, write
    from lever_data.relations.query import query as run_query

    if out is not None:
        from lever_data.store.files import require_writable, writing

        require_writable([out])
    options = QueryOptions(runs=tuple(run), sql_dir=sql_dir, timeout=timeout, memory=_bytes(memory))
    with run_query(store, _text(sql, file), options) as reader:
        if out is not None:
            chosen = _form_of(out) if form == "table" else form
            with writing(out) as handle:
                rows = write(reader, chosen, handle)
            notice(f"wrote {rows:,} rows to {out}")
        elif form == "table":
            _show(reader)
        else:
            write(reader, form, sys.stdout.buffer)
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


def _show(reader: pa.RecordBatchReader) -> None:
    from lever_data.relations.query import values

    rows: list[list[object]] = []
    names, more = reader.schema.names, 0
    for batch in reader:
        room = SHOWN - len(rows)
        shown = batch.slice(0, room).columns
        columns = [values(*pair) for pair in zip(names, shown, strict=True)]
        rows += [list(row) for row in zip(*columns, strict=True)]
        more += max(batch.num_rows - room, 0)
    emit_table(names, rows)
    if more:
        notice(f"… and {more:,} more rows; --format csv, json or parquet gives all")
