"""``lever ingest``: files into the store, one run each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lever_data.options import words
from lever_data.sources.ingest_options import IngestOptions
from lever_data.vocabulary import DEFAULT_STORE, JsonFile, StorePath

from .common import emit, emit_table, notice, progress_bar
from .flags import with_flags


@with_flags
def ingest(
    paths: Annotated[
        tuple[Path, ...],
        words(
            "RL data, beams, questions and annotations, results, a list of texts (JSON), "
            "embeddings (.pt, .npy, .safetensors), plain, gzip or zstd; any data set: JSON lines, "
            "CSV, Parquet, a folder that datasets saved.",
            metavar="PATH…",
            argument=True,
        ),
    ],
    options: IngestOptions,
    store: StorePath = DEFAULT_STORE,
    json: JsonFile = None,
) -> None:
    """Ingest files into the store; what a file is, is told by its content.

    lever ingest rl_data.json.gz --store S --dataset okvqa --split train
    """
    from lever_data.errors import LeverError
    from lever_data.sources.ingest import ingest as ingest_files
    from lever_data.store.arrow_start import start_lean
    from lever_data.store.store import Store

    start_lean()
    rows: list[dict[str, object]] = []
    try:
        with progress_bar("ingest", "B") as advance, Store.to_fill(store) as opened:
            told = options.but(progress=advance, notice=notice)
            for done in ingest_files(paths, opened, told):
                run = done.run
                rows.append({"run": run.run, "kind": run.kind, "rows": run.num_rows})
                if not done.is_new:
                    notice(f"already ingested as {run.run}; nothing changed")
    except LeverError:
        if rows:
            notice(
                f"committed before the error, and kept: {', '.join(str(r['run']) for r in rows)}"
            )
        raise
    if not emit(rows, json):
        emit_table(["run", "kind", "rows"], [list(row.values()) for row in rows])
