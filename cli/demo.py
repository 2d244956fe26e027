"""``lever demo``: the whole line on an embedded example."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonFlag, emit_json, emit_table, notice, progress_bar


def demo(
    out: Annotated[Path, typer.Option(help="Folder to fill.", metavar="DIR")] = Path("lever-demo"),
    questions: Annotated[
        int,
        typer.Option(help="Train questions of the world; a third as many are held out.", min=120),
    ] = 2400,
    json: JsonFlag = False,
) -> None:
    """Run the whole line on a small world made here: legacy JSON in, a trained selector out.

    Nothing is downloaded. It ends with a table that compares the trained selector with random and
    nearest-neighbour picks on held-out questions.
    """
    from lever_data.demo_world import WorldSpec
    from lever_train.demo import DemoOptions, run_demo

    world = WorldSpec(train=questions, held_out=questions // 3)
    with progress_bar("train", "queries") as advance:
        result = run_demo(DemoOptions(out, world, say=notice, advance=advance))
    if json:
        emit_json(result.scoreboard.to_json())
        return
    emit_table(
        ["run", "kind", "rows"],
        [[done.run.run, done.run.kind, done.run.num_rows] for done in result.ingested],
        title="In the store",
    )
    emit_table(
        ["view", "rows", "what it answers"],
        [[view.name, view.rows, view.purpose] for view in result.views],
        title="\nViews on it",
    )
    emit_table(
        ["picks", "shots", "accuracy", "low", "high", "questions"],
        [
            [r.selector, r.shots, f"{r.accuracy:.1%}", f"{r.low:.1%}", f"{r.high:.1%}", r.n]
            for r in result.scoreboard.rows
        ],
        title="\nVQA accuracy on held-out questions, with 95 % intervals",
    )
    for pair in result.scoreboard.paired:
        if pair.b == "nearest":
            notice(
                f"{pair.shots} shots: trained − nearest {pair.difference:+.1%} "
                f"({pair.low:+.1%} to {pair.high:+.1%}), McNemar p = {pair.p:.2g}"
            )
    notice(f"store: {result.store}   checkpoints: {result.training.out}")
    notice(f"look around: lever views --store {result.store}")
