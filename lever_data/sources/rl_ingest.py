"""Ingest one file of RL or beam data as one run, while it is hashed and written alongside.

In goes a source, out comes the committed run. Decoding runs on this thread; hashing the file and
encoding Parquet run on two others, which need no lock of the interpreter.
"""

from __future__ import annotations

import gc
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.readers.source import BackgroundHash, Progress, Source
from lever_data.sources.beam import BeamFormat
from lever_data.sources.belong import compared
from lever_data.sources.decode import LegacyReader, RestartError
from lever_data.sources.fields import GEN_METHODS, Context, Format
from lever_data.sources.rl import RlFormat
from lever_data.store.store import Run, RunSpec, Store
from lever_data.store.writer import RunWriter

_TURN = 2e-4  # seconds a thread keeps the interpreter's lock where another wants it


def ingest_legacy(
    source: Source,
    store: Store,
    spec: RunSpec,
    progress: Progress | None,
    notice: Callable[[str], None],
) -> tuple[Run, bool]:
    """Ingest one RL or beam file as ``spec`` says, but for its hash, which is found here.

    Returns:
        The run, and whether it is new.

    Raises:
        LeverError: the file is broken; nothing is committed. With ``salvage`` among the
            parameters, only where nothing whole is left.
    """
    digest = BackgroundHash(source)
    scorer: str | None = None
    while True:
        context = Context(str(spec.dataset), str(spec.split), scorer)
        form: Format = BeamFormat(context) if spec.kind == "beam" else RlFormat(context)
        try:
            return _ingest_once(source, store, spec, form, (digest, progress, notice))
        except RestartError as late:
            scorer = late.scorer


def _ingest_once(
    source: Source,
    store: Store,
    spec: RunSpec,
    form: Format,
    around: tuple[BackgroundHash, Progress | None, Callable[[str], None]],
) -> tuple[Run, bool]:
    digest, progress, notice = around
    salvage = bool(spec.parameters.get("salvage"))
    with store.begin(spec) as writer, source.reader(progress) as bytes_in:
        reader = LegacyReader(bytes_in.read, str(source.path), form, salvage=salvage)
        with _no_gc(), _quick_turns():
            _write_all(writer, compared(store, spec, reader.batches()))
        if not reader.num_queries:
            raise _no_queries(reader, source)
        spec = replace(spec, source_sha256=digest.result())
        writer.spec = spec
        known = store.find(spec)
        if known is not None:
            return known, False
        _tell(reader, source, notice)
        if isinstance(form, RlFormat) and (odd := form.methods - {None, *GEN_METHODS}):
            shown = ", ".join(sorted(f'"{one}"' for one in odd if one))
            notice(
                f"{source.path}: unknown gen_method {shown}: kept as it stands, in no view by "
                f"method (those know {', '.join(GEN_METHODS)})"
            )
        return writer.commit(_details(reader, form)), True


@contextmanager
def _no_gc() -> Iterator[None]:
    """Records have no cycles; looking for some costs a sixth of the decoding."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _quick_turns() -> Iterator[None]:
    """The threads that hash and write need the lock often and briefly; usual are turns of 5 ms."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _write_all(writer: RunWriter, batches: Iterable[Any]) -> None:
    """Write batches on a second thread, a few behind: a row group takes it several blocks long."""
    pending: queue.Queue[tuple[str, pa.RecordBatch] | None] = queue.Queue(16)
    failures: list[BaseException] = []

    def work() -> None:
        while (item := pending.get()) is not None:
            try:
                if not failures:
                    writer.write(*item)
            except BaseException as error:  # noqa: BLE001 - raised below; else the queue fills up
                failures.append(error)

    thread = threading.Thread(target=work, name="parquet")
    thread.start()
    try:
        for built in batches:
            pending.put(("candidates", built.candidates))
            pending.put(("queries", built.queries))
            if failures:
                break
    finally:
        pending.put(None)
        thread.join()
    if failures:
        raise failures[0]


def _no_queries(reader: LegacyReader, source: Source) -> LeverError:
    what = "the file holds no queries"
    if reader.found.num_skipped:
        what = f"nothing whole is left of the file; first fault: {reader.found.skipped[0]}"
    return LeverError(what, where=str(source.path))


def _tell(reader: LegacyReader, source: Source, notice: Callable[[str], None]) -> None:
    found = reader.found
    if found.non_finite:
        counts = ", ".join(f"{key} {n}" for key, n in sorted(found.non_finite.items()))
        notice(f"{source.path}: NaN or infinite numbers stored as null: {counts}")
    if found.num_skipped:
        notice(f"{source.path}: left out {found.num_skipped} broken parts:")
        for line in found.skipped:
            notice(f"  {line}")


def _details(reader: LegacyReader, form: Format) -> dict[str, Any]:
    found = reader.found
    details: dict[str, Any] = {
        "queries": reader.num_queries,
        "non_finite": dict(sorted(found.non_finite.items())),
        "top": found.top,
    }
    if isinstance(form, RlFormat) and form.layout is not None:
        details["layout"] = asdict(form.layout)
        details["generation"] = _generation(form)
    if found.num_skipped:
        details["skipped"] = {"count": found.num_skipped, "first": found.skipped}
    return details


def _generation(form: RlFormat) -> int:
    """1 plain, 2 with the eval mode, 3 with pools or positions (LEGACY: v4)."""
    layout = form.layout
    assert layout is not None
    if "pointer_pos" in layout.candidate_keys or len(layout.value_keys) > 1:
        return 3
    return 2 if "vqa_eval_mode" in layout.candidate_keys else 1
