"""``lever sweep``: train and judge every cell of a grid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lever_data.options import words
from lever_data.vocabulary import JsonFile
from lever_train.options.engine import Engine

from .common import emit, emit_table, notice, progress_bar, say
from .flags import with_flags

if TYPE_CHECKING:
    from lever_train.flow.sweep_page import SweepReport


@with_flags
def sweep(
    config: Annotated[Path, words("The sweep file.", metavar="SWEEP.toml", argument=True)],
    jobs: Annotated[
        int, words("Cells at a time, each in a process.", metavar="N", everyday=True)
    ] = 1,
    *,
    engine: Engine,
    json: JsonFile = None,
) -> None:
    """Sweep over views, rewards and any training option; finished cells are kept.

    The report says how many cells were tried and what luck alone would give the best of them.
    """
    from lever_train.flow.sweep import sweep as library
    from lever_train.options.sweep import DEMO, load_sweep

    resolved = load_sweep(config)
    if resolved.base == DEMO:
        from lever_demo.demo import CONFIG, DemoOptions, prepare_demo

        folder = resolved.out / "demo"
        prepare_demo(DemoOptions(folder))
        resolved = resolved.model_copy(update={"base": str(folder / CONFIG)})
    with progress_bar("sweep", "cells") as advance:
        report = library(resolved, jobs, notice, advance, engine)
    if not emit(report.to_json(), json):
        _show(report)
    notice(f"page: {resolved.out / report.name / 'sweep.html'}")
    notice(f"committed as {report.run}: select * from sweeps where sweep = '{report.name}'")
    if report.failed:
        raise typer.Exit(1)


def _show(report: SweepReport) -> None:
    from lever_train.flow.sweep_page import choice, luck, setting, spreads

    names = list(dict.fromkeys(name for cell in report.cells for name in cell.settings))
    shares = ["accuracy %", "low", "high", "change", "low", "high"]
    emit_table(
        [*names, "held-out %", *shares],
        [
            [
                *(setting(cell.settings.get(name, "")) for name in names),
                None if cell.validation is None else f"{100 * cell.validation:.2f}",
                *(f"{100 * v:.2f}" for v in (cell.accuracy, cell.low, cell.high)),
                *(
                    None if v is None else f"{100 * v:+.2f}"
                    for v in (cell.difference, cell.difference_low, cell.difference_high)
                ),
            ]
            for cell in report.cells
        ],
        title=f"Sweep {report.name} on {report.about['dataset/split']}, answered by "
        f"{report.about['answerer']}: mean over shot numbers, 95 % intervals",
    )
    print()
    said = (choice(report), luck(report), *spreads(report))
    for line in (*said, f"its checkpoint: {report.cells[0].checkpoint}"):
        say(line)
