"""``lever demo``: the whole pipeline on an embedded example."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lever_data.options import words
from lever_data.vocabulary import JsonFile

from .common import emit, emit_table, notice, progress_bar
from .flags import with_flags

if TYPE_CHECKING:
    from lever_demo.demo import DemoResult


@with_flags
def demo(
    out: Annotated[Path, words("Folder to fill.", metavar="DIR", everyday=True)] = Path(
        "lever-demo"
    ),
    questions: Annotated[
        int, words("Train questions of the world; a third as many are held out.", ge=120)
    ] = 2400,
    json: JsonFile = None,
) -> None:
    """Run the whole pipeline on a small world made here: legacy JSON in, a trained selector out.

    Nothing is downloaded. It ends with a table that compares what was trained with random and
    nearest-neighbour picks on held-out questions.
    """
    from lever_demo.demo import DemoOptions, run_demo
    from lever_demo.world import WorldSpec

    world = WorldSpec(train=questions, held_out=questions // 3)
    with progress_bar("demo") as advance:
        result = run_demo(DemoOptions(out, world, say=notice, advance=advance))
    if emit(result.scoreboard.to_json(), json):
        return
    _show_result(result)
    notice(f"change {out / 'lever.toml'}, then: lever run --config {out / 'lever.toml'}")
    notice(f"look around: lever board --store {result.config.data.store}")


def _show_result(result: DemoResult) -> None:
    from lever_train.flow.run import summary

    from .eval import show_scoreboard

    emit_table(
        ["run", "kind", "split", "rows"],
        [[run.run, run.kind, run.split, run.num_rows] for run in result.runs],
        title="In the store",
    )
    emit_table(
        ["view", "rows", "what it answers"],
        [[view.name, view.rows, view.purpose] for view in result.views],
        title="\nViews on it",
    )
    print()
    show_scoreboard(result.scoreboard)
    print()
    emit_table(["made", "where"], summary(result.config, result.outputs))
