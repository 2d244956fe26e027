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
        scorer: only candidates of this scorer, or of none known.
        sql_dir: a folder of the user's own views.
        timeout: seconds after which the query is killed.
        memory: bytes DuckDB may use; the process is held to about twice that.
    """

    runs: tuple[str, ...] = ()
    scorer: str | None = None
    sql_dir: Path | None = None
    timeout: float = 300.0
    memory: int = 4_000_000_000


@contextmanager
def query(
    store: Path, sql: str, options: QueryOptions | None = None
) -> Iterator[pa.RecordBatchReader]:
    """Run ``sql`` and give its result as a record batch reader, while the block lasts.

    Raises:
        UsageError: the text is not exactly one reading SELECT.
        LeverError: DuckDB refuses the query, or it outran its time or memory.
    """
    options = options or QueryOptions()
    child = subprocess.Popen(
        [sys.executable, "-m", "lever_data.sandbox"],
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


def write(reader: pa.RecordBatchReader, form: str, out: IO[bytes]) -> int:
    """Write a result as csv, json (one array of objects) or parquet; returns the rows written."""
    if form == "csv":
        return _write_csv(reader, out)
    if form == "json":
        return _write_json(reader, out)
    if form == "parquet":
        return _write_parquet(reader, out)
    raise UsageError("unknown format", value=form, hint=f"one of {', '.join(FORMATS)}")


def _request(store: Path, sql: str, options: QueryOptions) -> dict[str, Any]:
    from lever_data.store import Store

    return {
        "store": str(Store.open(store).path),
        "sql": sql,
        "runs": list(options.runs),
        "scorer": options.scorer,
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
    writer.writerow(reader.schema.names)
    rows = 0
    for batch in reader:
        columns = [_plain(column) for column in batch.columns]
        writer.writerows(zip(*columns, strict=True))
        rows += batch.num_rows
    text.detach()
    return rows


def _plain(column: pa.Array) -> list[object]:
    """Values for a CSV cell: nested ones as JSON, null as the empty cell."""
    import msgspec
    import pyarrow as pa

    if not pa.types.is_nested(column.type):
        return list(column.to_pylist())
    return [v if v is None else msgspec.json.encode(v).decode() for v in column.to_pylist()]


def _write_json(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:
    import msgspec

    rows = 0
    encoder = msgspec.json.Encoder(decimal_format="number", enc_hook=str)
    out.write(b"[")
    for batch in reader:
        for row in batch.to_pylist():
            out.write(b",\n " if rows else b"")
            out.write(encoder.encode(row))  # NaN becomes null
            rows += 1
    out.write(b"]\n")
    return rows


def _write_parquet(reader: pa.RecordBatchReader, out: IO[bytes]) -> int:
    import pyarrow.parquet as pq

    rows = 0
    with pq.ParquetWriter(out, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows
