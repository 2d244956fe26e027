"""``lever export``: a run back to legacy JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DEFAULT_STORE, JsonFlag, StoreOption, emit_json, emit_table, progress_bar


def export(
    run: Annotated[str, typer.Option("--run", help="The run's id, or a prefix only it has.")],
    out: Annotated[Path, typer.Option("--out", help="File to write; .gz compresses it.")],
    store: StoreOption = DEFAULT_STORE,
    json: JsonFlag = False,
) -> None:
    """Write a run back as legacy JSON, equal as JSON to what was ingested.

    [bold]lever export --store S --run RUN --out back.json[/bold]
    """
    from lever_data.sources.export import export as export_run
    from lever_data.store.files import require_writable
    from lever_data.store.store import Store

    require_writable([out])
    with progress_bar("export") as advance:
        done = export_run(Store.open(store), run, out, advance)
    row: dict[str, object] = {
        "run": done.run.run,
        "queries": done.num_queries,
        "candidates": done.num_candidates,
        "file": str(out),
    }
    if json:
        emit_json(row)
    else:
        emit_table(list(row), [list(row.values())])
