"""``lever query``: one reading SELECT over the store."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from lever_data.options import words
from lever_data.relations.query_options import QueryOptions
from lever_data.vocabulary import DEFAULT_STORE, StorePath

from .common import emit_table, emit_vertical, notice
from .flags import with_flags


@with_flags
def query(
    options: QueryOptions,
    sql: Annotated[str | None, words("The SELECT.", argument=True)] = None,
    file: Annotated[
        Path | None, words("Read the SELECT from here.", metavar="FILE", everyday=True)
    ] = None,
    store: StorePath = DEFAULT_STORE,
    form: Annotated[
        Literal["table", "csv", "json", "parquet"],
        words("Form of the output.", "--format", everyday=True),
    ] = "table",
    out: Annotated[
        Path | None,
        words("Write here, not to stdout.", metavar="FILE", everyday=True, output=True),
    ] = None,
    vertical: Annotated[bool, words("A line for every value of the table.", everyday=True)] = False,
) -> None:
    """Run one reading SELECT over the store's relations (`lever views` lists them).

    lever query "select gen_method, avg(correct) from all_candidates group by 1"
    """
    from lever_data.relations.query import write_query

    text = _text(sql, file)
    if out is not None:
        from lever_data.store.files import writing

        chosen = _form_of(out) if form == "table" else form
        with writing(out) as handle:
            rows = write_query(store, text, chosen, handle, options)
        notice(f"wrote {rows:,} rows to {out}")
    elif form == "table":
        cells = io.BytesIO()
        write_query(store, text, form, cells, options)
        _show(json.loads(cells.getvalue()), emit_vertical if vertical else emit_table)
    else:
        write_query(store, text, form, sys.stdout.buffer, options)
        sys.stdout.buffer.flush()


def _text(sql: str | None, file: Path | None) -> str:
    from lever_data.errors import LeverError, UsageError, reason

    if (sql is None) == (file is None):
        what = "is given twice" if sql is not None else "is missing"
        raise UsageError(f"the SELECT {what}", hint="an argument, or --file")
    if sql is not None:
        return sql
    assert file is not None
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LeverError(
            f"the SQL file cannot be read ({reason(error)})", where=str(file)
        ) from error


def _form_of(out: Path) -> str:
    from lever_data.errors import UsageError

    form = out.suffix.removeprefix(".")
    if form not in ("csv", "json", "parquet"):
        raise UsageError("the name of --out does not say its form", value=str(out), hint="--format")
    return form


def _show(found: dict[str, Any], emit: Callable[..., None]) -> None:
    emit(found["names"], found["rows"])
    if found["more"]:
        notice(f"… and {found['more']:,} more rows; --format csv, json or parquet gives all")
