"""``lever run``: the whole pipeline, doing only what is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lever_data.options import words
from lever_data.vocabulary import DryRun, JsonFile

from .common import emit, emit_table, notice, progress_bar
from .flags import with_flags

if TYPE_CHECKING:
    from lever_train.flow.pipeline import PlanLine
    from lever_train.flow.run import RunRequest


@with_flags
def run(
    legacy_words: Annotated[
        tuple[str, ...],
        words(
            "The legacy form: task dataset gpu lever_lm sampler model; v3 or v2 behind them "
            "evaluates what was trained.",
            metavar="[LEGACY WORDS]",
            argument=True,
        ),
    ] = (),
    config: Annotated[
        Path | None,
        words(
            "The pipeline's config; ./lever.toml if none is named.", metavar="FILE", everyday=True
        ),
    ] = None,
    dry_run: DryRun = False,
    force: Annotated[
        tuple[str, ...], words("Redo this step even if nothing changed.", metavar="STEP")
    ] = (),
    answerer: Annotated[str | None, words("Who answers; beats the config.")] = None,
    encoder: Annotated[str | None, words("Who embeds; beats the config.")] = None,
    device: Annotated[str | None, words("cpu, cuda:N, mps; beats the config.")] = None,
    rounds: Annotated[
        int | None, words("Rounds at most; beats the config.", metavar="N", ge=1)
    ] = None,
    budget: Annotated[
        int | None, words("Answers in all rounds together; beats the config.", metavar="N", ge=1)
    ] = None,
    json: JsonFile = None,
) -> None:
    """Run embeddings → SFT → RL data → audit → RCE (+ GRPO) → older format → evaluation.

    A step whose inputs, parameters and code are unchanged is skipped; a killed run goes on.
    """
    import os

    from lever_train.flow import run as library

    request = library.RunRequest(
        legacy_words,
        config,
        answerer,
        encoder,
        device,
        Path(),
        dict(os.environ),
        rounds=rounds,
        budget=budget,
    )
    show_run(request, dry_run, force, json)


def show_run(request: RunRequest, dry_run: bool, force: tuple[str, ...], json: Path | None) -> None:
    """Run, or plan, a request, and show what was made."""
    from lever_train.flow import run as library

    say = print if json is None else notice
    for line in request.opening():
        say(line)
    resolved = request.resolve()
    for line in [f"mode: {library.mode(resolved)}", *library.found(request, resolved)]:
        say(line)
    if dry_run:
        _show_plan(library.plan(resolved, force), json)
        return
    with progress_bar("run") as advance:
        outputs = library.run(resolved, notice, advance, force)
    if not emit(outputs, json):
        _show_result(outputs, library.summary(resolved, outputs))
        print(f"use it: {library.use_it(resolved, outputs)}")  # no table: it must not be wrapped


def _show_result(outputs: dict[str, Any], summary: list[tuple[str, str]]) -> None:
    scores = outputs["evaluate"].get("json")
    if scores is not None:
        from lever_train.evaluate.scores import read_json

        from .eval import show_scoreboard

        show_scoreboard(read_json(Path(scores)))
        print()
    emit_table(["made", "where"], summary)


def _show_plan(plan: list[PlanLine], json: Path | None) -> None:
    rows = [[item.step.name, item.verdict, item.why] for item in plan]
    names = ("step", "verdict", "why")
    if not emit([dict(zip(names, row, strict=True)) for row in rows], json):
        emit_table(["step", "what", "why"], rows)
