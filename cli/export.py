"""``lever export``: a run back to legacy JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from lever_data.options import words
from lever_data.vocabulary import DEFAULT_STORE, JsonFile, RunName, StorePath

from .common import emit, emit_table, progress_bar
from .flags import with_flags


@with_flags
def export(
    run: RunName,
    out: Annotated[Path, words("File to write; .gz compresses it.", metavar="FILE", output=True)],
    store: StorePath = DEFAULT_STORE,
    reader: Annotated[
        Literal["notes", "newest"] | None,
        words(
            "Write what this state of the legacy code reads: that of the notes, or the newest "
            "(since 2025-12-29). Pointers are ids in both.",
            "--for",
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Write a run back as legacy JSON, equal as JSON to what was ingested unless --for is given.

    lever export --store S --run RUN --out back.json
    """
    from lever_data.sources.export import export as export_run
    from lever_data.store.store import Store

    with progress_bar("export") as advance:
        done = export_run(Store.open(store), run, out, advance, reader)
    row: dict[str, object] = {
        "run": done.run.run,
        "queries": done.num_queries,
        "candidates": done.num_candidates,
        "file": str(out),
    }
    if not emit(row, json):
        emit_table(list(row), [list(row.values())])
