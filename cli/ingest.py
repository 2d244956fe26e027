"""``lever ingest``: files into the store, one run each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from .common import (
    DEFAULT_STORE,
    JsonFlag,
    StoreOption,
    emit_json,
    emit_table,
    notice,
    progress_bar,
)


def ingest(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="RL data, beams, questions and annotations, results (JSON), embeddings (.pt, "
            ".npy, .safetensors); plain, gzip or zstd.",
            metavar="PATH…",
            show_default=False,
        ),
    ],
    store: StoreOption = DEFAULT_STORE,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Name of the data set.", metavar="NAME")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of the rows.", metavar="NAME")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of embeddings or results (default: the file's stem)."),
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            help="What numbers questions: their place in the `file`, or `question_id`, as in all "
            "legacy data."
        ),
    ] = "file",
    image_name: Annotated[
        str | None,
        typer.Option(
            help="Names the image files in place of what the questions say: '{image_id}.jpg'.",
            metavar="PATTERN",
        ),
    ] = None,
    shots: Annotated[
        int, typer.Option(help="Demonstrations shown for the predictions of a results file.", min=0)
    ] = 0,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Commit what is whole, list what is not.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Ingest files into the store; what a file is, is told by its content.

    [bold]lever ingest rl_data.json.gz --store S --dataset okvqa --split train[/bold]
    """
    from lever_data.errors import LeverError
    from lever_data.sources.ingest import IngestOptions
    from lever_data.sources.ingest import ingest as ingest_files
    from lever_data.sources.questions import Order
    from lever_data.store.arrow_start import start_lean
    from lever_data.store.store import Store

    start_lean()
    rows: list[dict[str, object]] = []
    try:
        with progress_bar("ingest", "B") as advance:
            options = IngestOptions(
                dataset=dataset,
                split=split,
                name=name,
                salvage=salvage,
                order=cast(Order, order),  # an unknown one is refused
                image_name=image_name,
                shots=shots,
                progress=advance,
                notice=notice,
            )
            for done in ingest_files(paths, Store.create(store), options):
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
    if json:
        emit_json(rows)
    else:
        emit_table(["run", "kind", "rows"], [list(row.values()) for row in rows])
