"""``lever diff``: two runs, two views or two evaluations, and whether the change is real."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DEFAULT_STORE, RunsOption, SqlDirOption, StoreOption, emit_table, notice


def diff(
    a: Annotated[str, typer.Argument(help="A run, RUN:SELECTOR of an evaluation, or a view.")],
    b: Annotated[str, typer.Argument(help="The same kind of thing.")],
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    sql_dir: SqlDirOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Compare A with B: what only one has, the paired change in accuracy, McNemar's test."""
    from dataclasses import asdict

    from lever_data.report.diff import DiffRequest, diff
    from lever_data.store.files import require_writable, write_json
    from lever_data.store.store import Store

    if json is not None:
        require_writable([json])
    found = diff(Store.open(store), DiffRequest(a, b, tuple(run), sql_dir, seed))
    pairs = "query and pointer" if found.kind == "candidates" else "query and shots"
    rows: list[list[object]] = [
        [f"pairs ({pairs})", found.pairs],
        ["only in A", found.only_a],
        ["only in B", found.only_b],
        ["pairs whose accuracy changed", found.changed],
        ["mean change, B - A", found.mean_change],
        ["95 % interval from", found.low],
        ["95 % interval to", found.high],
        ["queries with a pick in both", found.picks],
        ["pick right, A", found.picks_right_a],
        ["pick right, B", found.picks_right_b],
        ["right only in A", found.mcnemar_only_a],
        ["right only in B", found.mcnemar_only_b],
        ["McNemar's exact p", found.mcnemar_p],
    ]
    emit_table(["A -> B", "figure"], rows, title=f"A: {a}\nB: {b}")
    if json is not None:
        write_json(json, asdict(found))
        notice(f"figures: {json}")
