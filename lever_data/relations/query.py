"""Run one reading SELECT over a store in a process of its own, bounded in time and memory.

In go SQL and limits, out come Arrow record batches, or the bytes of a form (see ``forms``). The
other process makes the form too: this one only passes bytes on, so that the limits hold for all of
it. Nothing heavy is imported before the other process is started: it imports the same meanwhile.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lever_data.errors import LeverError, UsageError
from lever_data.relations.child import Child, end, start

if TYPE_CHECKING:
    import pyarrow as pa

    from lever_data.relations.query_options import QueryOptions  # pydantic: 0.1 s of the child, too

FAILED = 3  # exit status of the child when it has said why on stderr
_CHUNK = 1 << 20  # bytes passed on at a time


@contextmanager
def query(
    store: Path, sql: str, options: QueryOptions | None = None
) -> Iterator[pa.RecordBatchReader]:
    """Run ``sql`` and give its result as a record batch reader, while the block lasts.

    Raises:
        UsageError: the text is not exactly one reading SELECT, or a limit is not a positive number.
        LeverError: DuckDB refuses the query, or it outran its time or memory.
    """
    with _started(store, sql, "arrow", options) as process:
        yield process.batches()


def write_query(
    store: Path, sql: str, form: str, out: IO[bytes], options: QueryOptions | None = None
) -> int:
    """Run ``sql`` and write its result to ``out`` in a form of ``forms.FORMS``; returns its rows.

    Raises:
        UsageError: as :func:`query`; or two columns have one name where names are keys.
        LeverError: as :func:`query`; or a value has no such form.
    """
    with _started(store, sql, form, options) as process:
        return process.copy_to(out)


@contextmanager
def _started(store: Path, sql: str, form: str, options: QueryOptions | None) -> Iterator[_Process]:
    """The process that answers, until the block ends; what it spilled to disk goes with it."""
    _require_utf8(sql)
    child = start()
    if options is None:
        from lever_data.relations.query_options import QueryOptions

        options = QueryOptions()
    process = _Process(child, options)
    timer = threading.Timer(options.timeout, process.expire)
    timer.daemon = True
    try:  # an interrupt may come at any line
        timer.start()
        from lever_data.store.spill import spill_folder  # after the child began: it imports more

        with spill_folder() as spill:
            process.ask(_request(store, sql, form, spill, options))
            yield process
    finally:
        timer.cancel()
        end(child)


def _require_utf8(sql: str) -> None:
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the SQL is not UTF-8 ({error.reason})",
            hint="set a UTF-8 locale, such as LC_ALL=C.UTF-8, or use --file",
        ) from None


def _request(
    store: Path, sql: str, form: str, spill: Path, options: QueryOptions
) -> dict[str, Any]:
    return {
        "store": str(store),
        "sql": sql,
        "form": form,
        "spill": str(spill),
        "runs": list(options.runs),
        "sql_dir": str(options.sql_dir) if options.sql_dir else None,
        "memory": int(options.memory * 1e9),
    }


class _Process:
    """The process that answers one request, and why it ended."""

    def __init__(self, child: Child, options: QueryOptions) -> None:
        self.child, self.options = child, options
        self.timed_out = False

    def expire(self) -> None:
        """End it: its time is over."""
        self.timed_out = True
        self.child.kill()

    def ask(self, request: dict[str, Any]) -> None:
        """Hand it the request; one that died already is asked why when its result is read."""
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps(request).encode() + b"\n")
            self.child.stdin.flush()

    def batches(self) -> pa.RecordBatchReader:
        """Its result, where the request's form is ``arrow``."""
        import pyarrow as pa

        try:
            reader = pa.ipc.open_stream(self.child.stdout)
        except pa.ArrowInvalid:
            raise self._error() from None

        def read() -> Iterator[pa.RecordBatch]:
            try:
                yield from reader
            except (pa.ArrowInvalid, OSError):
                raise self._error() from None
            if self.child.wait() != 0:
                raise self._error()
            assert self.child.stderr is not None
            self._pass_on(self.child.stderr.read().decode().splitlines())

        return pa.RecordBatchReader.from_batches(reader.schema, read())

    def copy_to(self, out: IO[bytes]) -> int:
        """Pass its bytes on; returns the rows it says there were."""
        assert self.child.stdout is not None and self.child.stderr is not None
        while chunk := self.child.stdout.read(_CHUNK):
            out.write(chunk)
        if self.child.wait() != 0 or self.timed_out:
            raise self._error()
        *said, counted = self.child.stderr.read().decode().splitlines()
        self._pass_on(said)
        return int(json.loads(counted)["rows"])

    def _pass_on(self, said: Iterable[str]) -> None:
        for line in said:
            logging.getLogger("lever.names").warning("%s", line)

    def _error(self) -> LeverError:
        """Why it ended.

        Raises:
            KeyboardInterrupt: it was interrupted, and so was this process.
        """
        assert self.child.stderr is not None
        text = self.child.stderr.read().decode("utf-8", "replace").strip()
        status = self.child.wait()
        if self.timed_out:
            return LeverError(
                "the query ran out of time",
                value=f"{self.options.timeout:g} s",
                hint="raise --timeout, or ask for less",
            )
        if status == -signal.SIGINT:
            raise KeyboardInterrupt  # it reaches both; an import here may have swallowed it
        if status == FAILED and text:
            found = json.loads(text.splitlines()[-1])
            kind = UsageError if found.pop("exit_code") == UsageError.exit_code else LeverError
            return kind(
                found["what"], where=found["where"], value=found["value"], hint=found["hint"]
            )
        if status > 0 and text and "Memory" not in text and "bad_alloc" not in text:
            return LeverError("the query's process failed", value=text.splitlines()[-1][:500])
        return LeverError(
            f"the query's process died with status {status}: it outran its memory",
            value=f"{self.options.memory:.1f} GB",
            hint="raise --memory, or ask for less",
        )
