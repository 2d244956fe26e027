"""``lever run``: the whole pipeline, doing only what is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import emit_json, emit_table, notice, progress_bar

if TYPE_CHECKING:
    from lever_train.flow.pipeline import Planned


def run(
    words: Annotated[
        list[str],
        typer.Argument(
            help="The legacy form: task dataset gpu lever_lm sampler model.",
            metavar="[LEGACY WORDS]",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer copies it
    config: Annotated[
        Path | None, typer.Option(help="The pipeline's config; ./lever.toml if none is named.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and why.")
    ] = False,
    force: Annotated[
        list[str], typer.Option(help="Redo this step even if nothing changed (repeatable).")
    ] = [],  # noqa: B006
    answerer: Annotated[str | None, typer.Option(help="Who answers; beats the config.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:N, mps; beats the config.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the plan or outputs as JSON.")
    ] = False,
) -> None:
    """Run embeddings → SFT → RL data → audit → RCE (+ GRPO) → older format → evaluation.

    A step whose inputs, parameters and code are unchanged is skipped; a killed run goes on.
    """
    import os

    from lever_train.flow import run as library

    request = library.RunRequest(tuple(words), config, answerer, device, Path(), dict(os.environ))
    say = notice if json else print
    for line in request.opening():
        say(line)
    resolved = request.resolve()
    say(f"mode: {library.mode(resolved)}")
    if dry_run:
        _show_plan(library.plan(resolved, force), json)
        return
    with progress_bar("run") as advance:
        outputs = library.run(resolved, notice, advance, force)
    if json:
        emit_json(outputs)
    else:
        _show_result(outputs, library.summary(resolved, outputs))
        print(f"use it: {library.use_it(resolved, outputs)}")  # no table: it must not be wrapped


def _show_result(outputs: dict[str, Any], summary: list[tuple[str, str]]) -> None:
    scores = outputs["evaluate"].get("json")
    if scores is not None:
        from lever_train.evaluate.scoreboard import read_json

        from .eval import show_scoreboard

        show_scoreboard(read_json(Path(scores)))
        print()
    emit_table(["made", "where"], summary)


def _show_plan(plan: list[Planned], json: bool) -> None:
    rows = [[item.step.name, item.verdict, item.why] for item in plan]
    if json:
        names = ("step", "verdict", "why")
        emit_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        emit_table(["step", "what", "why"], rows)
