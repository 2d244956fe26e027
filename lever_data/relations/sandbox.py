"""The child process that runs a user's SELECT: it can be killed, and it can only read the store.

In go a JSON request, a line of stdin, and out comes an Arrow IPC stream on stdout, or the bytes of
a form and the number of rows as JSON on stderr; a failure is one JSON object on stderr and exit
status 3. When stdin ends the process does: nobody waits for it any more.
DuckDB's own limits are not enough: ``interrupt`` does not stop ``repeat('x', 2e9)`` and the memory
limit does not see it; a process with RLIMIT_AS that its parent can kill is the bound that holds.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # before what takes long to import
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends it without a word
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see child.py
    sys.modules["numpy"] = None  # type: ignore[assignment] # pyarrow goes without it: 70 ms
    import pyarrow  # noqa: F401

    del sys.modules["numpy"]  # pandas, of which nanoseconds are made, needs it

import duckdb
import pyarrow as pa

from lever_data.catalog import tables_read
from lever_data.errors import LeverError, UsageError
from lever_data.older import as_asked, with_todays_names
from lever_data.relations.db import Session, open_session, plain_message, require_select
from lever_data.relations.forms import write
from lever_data.relations.query import FAILED

BATCH_ROWS = 16_384


def main() -> int:
    """Answer one request; returns the exit status."""
    if not (line := sys.stdin.readline()):
        return 0  # nobody asks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request: dict[str, Any] = json.loads(line)
    try:
        _answer(request)
    except LeverError as error:
        _fail(error.what, error.where, error.value, error.hint, error.exit_code)
    except (duckdb.OutOfMemoryException, MemoryError):
        limit = f"{request['memory'] / 1e9:.1f} GB"
        _fail("the query needs more memory than it may use", None, limit, "raise --memory", 1)
    except (duckdb.Error, UnicodeDecodeError) as error:
        _fail(plain_message(error), None, None, None, 1)
    else:
        return 0
    return FAILED


def _end_with_parent() -> NoReturn:
    """A query may take minutes without a byte of output, which nobody would miss."""
    sys.stdin.read()
    os._exit(FAILED)


def _answer(request: dict[str, Any]) -> None:
    with closing(duckdb.connect()) as con:
        _run(con, _session(con, request), request)


def _run(con: duckdb.DuckDBPyConnection, session: Session, request: dict[str, Any]) -> None:
    sql = request["sql"]
    con.execute("set memory_limit = ?", [f"{request['memory'] // 1_000_000}MB"])
    con.execute("set lock_configuration = true")
    _limit_address_space(request["memory"])
    try:
        now = require_select(con, sql)
    except duckdb.CatalogException as error:
        raise _explain(session, sql, error) from error
    reader = con.sql(now).to_arrow_reader(BATCH_ROWS)
    if now != sql:
        reader = _as_asked(reader, sql)
    if request["form"] == "arrow":
        with pa.ipc.new_stream(sys.stdout.buffer, reader.schema) as out:
            for batch in reader:
                out.write_batch(batch)
    else:
        rows = write(reader, request["form"], sys.stdout.buffer)
        print(json.dumps({"rows": rows}), file=sys.stderr)
    sys.stdout.buffer.flush()


def _as_asked(reader: pa.RecordBatchReader, sql: str) -> pa.RecordBatchReader:
    """The result with its columns named as the SELECT says them: scripts look for those."""
    _, renamed = with_todays_names(sql)
    fields = [f.with_name(as_asked(f.name, sql, renamed)) for f in reader.schema]
    schema = pa.schema(fields)
    batches = (pa.RecordBatch.from_arrays(b.columns, schema=schema) for b in reader)
    return pa.RecordBatchReader.from_batches(schema, batches)


def _session(con: duckdb.DuckDBPyConnection, request: dict[str, Any]) -> Session:
    sql = request["sql"]
    if len(con.extract_statements(sql)) != 1:  # looked at, here and below, and not run
        raise UsageError("exactly one statement is allowed", value=len(con.extract_statements(sql)))
    # Names inside query('…') and the catalog's own tables cannot be seen from outside.
    hidden = any(word in sql.lower() for word in ("query", "duckdb_", "schema", "show"))
    only = None if hidden else sorted(_tables(con, sql))
    return open_session(
        request["store"],
        runs=request["runs"],
        sql_dir=Path(request["sql_dir"]) if request["sql_dir"] else None,
        only=only,
        spill=Path(request["spill"]),
        con=con,
    )


def _tables(con: duckdb.DuckDBPyConnection, sql: str) -> set[str]:
    try:
        return tables_read(con, sql)
    except LeverError as error:
        statement = con.extract_statements(sql)[0]
        if statement.type != duckdb.StatementType.SELECT:
            raise UsageError(
                "only SELECT is allowed; a query never changes the store",
                value=statement.type.name,
            ) from error
        raise


def _explain(session: Session, sql: str, error: duckdb.CatalogException) -> LeverError:
    missing = re.match(r"Catalog Error: Table with name (\w+) does not exist", str(error))
    if missing and missing[1] in tables_read(session.con, sql):
        return session.explain_missing(missing[1])
    return LeverError(plain_message(error), hint="`lever views` lists the relations")


def _limit_address_space(memory: int) -> None:
    """Bound the process to what it maps now plus twice what DuckDB may use."""
    mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    limit = mapped + 2 * memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _fail(what: str, where: str | None, value: object, hint: str | None, code: int) -> None:
    error = {"what": what, "where": where, "value": value, "hint": hint, "exit_code": code}
    print(json.dumps(error, default=str), file=sys.stderr)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # an interpreter that is taken apart takes 0.1 s, for which the parent waits
