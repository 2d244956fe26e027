"""Run one reading SELECT over a store in a process of its own, bounded in time and memory.

In go SQL and limits, out come Arrow record batches, or the result as table, CSV, JSON or Parquet.
Nothing heavy is imported before the other process is started: it imports the same meanwhile.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lever_data.errors import LeverError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

FAILED = 3  # exit status of the child when it has said why on stderr
FORMATS = ("table", "csv", "json", "parquet")


@dataclass(frozen=True)
class QueryOptions:
    """Limits and scope of a query.

    Args:
        runs: only these runs; all where empty.
        sql_dir: a folder of the user's own views.
        timeout: seconds after which the query is killed.
        memory: bytes DuckDB may use; the process is held to about twice that.
    """

    runs: tuple[str, ...] = ()
    sql_dir: Path | None = None
    timeout: float = 300.0
    memory: int = 4_000_000_000


@contextmanager
def query(
    store: Path, sql: str, options: QueryOptions | None = None
) -> Iterator[pa.RecordBatchReader]:
    """Run ``sql`` and give its result as a record batch reader, while the block lasts.

    Raises:
        UsageError: the text is not exactly one reading SELECT, or a limit is no positive number.
        LeverError: DuckDB refuses the query, or it outran its time or memory.
    """
    options = options or QueryOptions()
    _require_sense(sql, options)
    child = subprocess.Popen(
        [sys.executable, "-m", "lever_data.relations.sandbox"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    timed_out = threading.Event()

    def expire() -> None:
        timed_out.set()
        child.kill()

    timer = threading.Timer(options.timeout, expire)
    timer.start()
    try:
        request = _request(store, sql, options)
        yield _checked(_open(child, request), child, timed_out, options)
    finally:
        timer.cancel()
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def _require_sense(sql: str, options: QueryOptions) -> None:
    if not 0 < options.timeout <= threading.TIMEOUT_MAX:
        raise UsageError("--timeout must be a positive number of seconds", value=options.timeout)
    if options.memory <= 0:
        raise UsageError("--memory must be a positive number", value=options.memory)
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the SQL is not UTF-8 ({error.reason})",
            hint="set a UTF-8 locale, such as LC_ALL=C.UTF-8, or use --file",
        ) from None


def write(reader: pa.RecordBatchReader, form: str, out: IO[bytes]) -> int:
    """Write a result as csv, json (one array of objects) or parquet; returns the rows written.

    Raises:
        UsageError: the form is unknown, or two columns have one name where names are keys.
        LeverError: a value has no such form.
    """
    names = reader.schema.names
    if form in ("json", "parquet") and len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(
            "columns of the result share a name",
            value=", ".join(twice),
            hint="name them apart: select a.x as first, b.x as second",
        )
    if form == "csv":
        return _write_csv(reader, out)
    if form == "json":
        return _write_json(reader, out)
    if form == "parquet":
        return _write_parquet(reader, out)
    raise UsageError("unknown format", value=form, hint=f"one of {', '.join(FORMATS)}")


def _request(store: Path, sql: str, options: QueryOptions) -> dict[str, Any]:
    from lever_data.store.store import Store

    return {
        "store": str(Store.open(store).path),
        "sql": sql,
        "runs": list(options.runs),
        "sql_dir": str(options.sql_dir) if options.sql_dir else None,
        "memory": options.memory,
    }


def _open(child: subprocess.Popen[bytes], request: dict[str, Any]) -> pa.RecordBatchReader | None:
    import pyarrow as pa

    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(request).encode())
        child.stdin.close()
        return pa.ipc.open_stream(child.stdout)
    except (pa.ArrowInvalid, BrokenPipeError):
        return None  # the child ended before its first batch: its stderr says why


def _checked(
    reader: pa.RecordBatchReader | None,
    child: subprocess.Popen[bytes],
    timed_out: threading.Event,
    options: QueryOptions,
) -> pa.RecordBatchReader:
    import pyarrow as pa

    if reader is None:
        raise _error(child, timed_out, options)

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            yield from reader
        except (pa.ArrowInvalid, OSError):
            raise _error(child, timed_out, options) from None
        if child.wait() != 0:
            raise _error(child, timed_out, options)

    return pa.RecordBatchReader.from_batches(reader.schema, batches())


def _error(
    child: subprocess.Popen[bytes], timed_out: threading.Event, options: QueryOptions
) -> LeverError:
    """Why the child ended.

    Raises:
        KeyboardInterrupt: it was interrupted, and so was this process.
    """
    assert child.stderr is not None
    text = child.stderr.read().decode("utf-8", "replace").strip()
    status = child.wait()
    if timed_out.is_set():
        return LeverError(
            "the query ran out of time",
            value=f"{options.timeout:g} s",
            hint="raise --timeout, or ask for less",
        )
    if status == -signal.SIGINT:
        raise KeyboardInterrupt  # it reaches both; an import of this process may have swallowed it
    if status == FAILED and text:
        found = json.loads(text.splitlines()[-1])
        kind = UsageError if found.pop("exit_code") == UsageError.exit_code else LeverError
        return kind(found["what"], where=found["where"], value=found["value"], hint=found["hint"])
    if status > 0 and text and "Memory" not in text and "bad_alloc" not in text:
        return LeverError("the query's process failed", value=text.splitlines()[-1][:500])
    return LeverError(
        f"the query's process died with status {status}: it outran its memory",
        value=f"{options.memory / 1e9:.1f} GB",
        hint="raise --memory, or ask for less",
    )


def _write_csv(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:
    import csv
    import io

    text = io.TextIOWrapper(out, "utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    names = reader.schema.names
    writer.writerow(names)
    rows = 0
    for batch in reader:
        columns = [_plain(*pair) for pair in zip(names, batch.columns, strict=True)]
        writer.writerows(zip(*columns, strict=True))
        rows += batch.num_rows
    text.detach()
    return rows


def values(name: str, column: pa.Array) -> list[Any]:
    """The values of a column as Python's.

    Raises:
        LeverError: one has no such form, such as a date before the year 1.
    """
    import pyarrow as pa

    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError, pa.ArrowNotImplementedError) as error:
        raise LeverError(
            f"a value of the result cannot be written ({error})",
            where=f"column {name}",
            hint=f"select it as text: {name}::varchar",
        ) from None


def _plain(name: str, column: pa.Array) -> list[Any]:
    """Values for a CSV cell: nested ones as JSON, null as the empty cell."""
    import msgspec
    import pyarrow as pa

    found = values(name, column)
    if not pa.types.is_nested(column.type):
        return found
    return [v if v is None else msgspec.json.encode(v).decode() for v in found]


def _write_json(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:
    import msgspec

    rows = 0
    encoder = msgspec.json.Encoder(decimal_format="number", enc_hook=str)
    out.write(b"[")
    names = reader.schema.names
    for batch in reader:
        columns = [values(*pair) for pair in zip(names, batch.columns, strict=True)]
        for row in zip(*columns, strict=True):
            out.write(b",\n " if rows else b"")
            out.write(encoder.encode(dict(zip(names, row, strict=True))))  # NaN becomes null
            rows += 1
    out.write(b"]\n")
    return rows


def _write_parquet(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 0
    try:
        with pq.ParquetWriter(out, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
                rows += batch.num_rows
    except pa.ArrowNotImplementedError as error:
        raise LeverError(
            f"Parquet has no such type ({error})", hint="select the column as text: name::varchar"
        ) from None
    return rows
