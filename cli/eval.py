"""``lever eval``: checkpoints on held-out questions, beside the baselines they have to beat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lever_data.errors import UsageError
from lever_data.options import words
from lever_data.vocabulary import HtmlFile, JsonFile
from lever_train.options.engine import Engine
from lever_train.options.evaluate import EvalRequest

from .common import emit, emit_table, notice, progress_bar, say
from .flags import with_flags

if TYPE_CHECKING:
    from lever_train.evaluate.scores import PairTest, Row, Scoreboard


@with_flags
def eval(
    request: EvalRequest,
    legacy_words: Annotated[
        tuple[str, ...],
        words(
            "The legacy form, as of `lever run`: the checkpoint is looked for by these names.",
            metavar="[LEGACY WORDS]",
            argument=True,
        ),
    ] = (),
    predictions: Annotated[
        Path | None,
        words(
            "Folder for the answers as official results files, one a selector and shot number.",
            metavar="DIR",
        ),
    ] = None,
    encoder: Annotated[str | None, words("Who embeds, in the legacy form.")] = None,
    *,
    engine: Engine,
    json: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Evaluate selectors at 1-4 shots: the task's metric with intervals and paired differences.

    Zero-shot, random and nearest-neighbour are always beside them, and the best of the pool where
    the answerer is cheap (exact at one shot, a lower bound at more).
    """
    import os

    from lever_data.store.files import write_text
    from lever_train.evaluate.api import run_evaluation
    from lever_train.evaluate.predictions import write_results
    from lever_train.evaluate.scoreboard_page import scoreboard_page
    from lever_train.flow.run import RunRequest

    from .run import show_run

    if legacy_words:
        if predictions is not None or html is not None:
            raise UsageError("the legacy form names the files it writes itself")
        if engine.engine != "local":
            raise UsageError("the legacy form is answered here", value=engine.engine)
        asked = RunRequest.of_eval(legacy_words, request, dict(os.environ), encoder)
        show_run(asked, False, (), json)
        return
    if encoder is not None:
        raise UsageError("--encoder goes with the legacy words", value=encoder)
    with progress_bar("eval", "answers") as advance:
        found = run_evaluation(request, advance, engine)
    board = found.scoreboard
    if not emit(board.to_json(), json):
        show_scoreboard(board)
    if html is not None:
        write_text(html, scoreboard_page(board))
        notice(f"wrote {html}")
    if predictions is not None:
        files = write_results(found.outcomes, found.question_ids, predictions)
        notice(f"wrote {len(files)} results files to {predictions}")
    for line in found.notices:
        notice(line)
    notice(f"{'committed' if found.is_new else 'already evaluated'} as {board.run}")


def show_scoreboard(board: Scoreboard) -> None:
    """Tables with a column a shot number: accuracies, paired differences, copied answers."""
    shown = ("dataset/split", "checkpoints", "answerer", "date")
    about = [f"{name} {board.about[name]}" for name in shown if name in board.about]
    say(", ".join([*about, f"run {board.run}"]))
    print()
    from lever_train.evaluate.scores import shots_said

    shots = sorted({row.shots for row in board.rows if row.shots})
    zero = [row for row in board.rows if row.shots == 0]
    emit_table(
        ["selector", "questions", *map(shots_said, shots)],
        [
            *(
                [row.selector, row.n, f"{_accuracy(row)} without any", *[""] * (len(shots) - 1)]
                for row in zero
            ),
            *_by_shots(
                [
                    (row.selector, row.n + row.failed, row.shots, _accuracy(row))
                    for row in board.rows
                ],
                shots,
            ),
        ],
        title=f"{board.metric} in % (95 % interval); the oracle is a lower bound from 2 shots on",
    )
    pairs = [(f"{p.a} - {p.b}", p.n, p.shots, _difference(p)) for p in board.paired]
    shown_of = [(r, f"{r.shown:.2f}") for r in board.rows if r.shown is not None]
    copied_of = [(r, f"{100 * r.copied:.1f}") for r in board.rows if r.copied is not None]
    early, copied = (
        [(r.selector, r.n + r.failed, r.shots, cell) for r, cell in cells]
        for cells in (shown_of, copied_of)
    )
    for first, cells, title in (
        (
            "difference",
            pairs,
            "Paired by question, in percentage points (95 % interval; p of no difference)",
        ),
        ("selector", early, "Demonstrations shown on average, where a selector may show fewer"),
        ("selector", copied, "Wrong answers that are the answer of a demonstration shown, in %"),
    ):
        if cells:
            print()
            heads = [first, "questions", *map(shots_said, shots)]
            emit_table(heads, _by_shots(cells, shots), title=title)
    failed = sum(r.failed for r in board.rows)
    if failed:
        notice(f"{failed:,} answers failed; they are left out of the means")


def _by_shots(cells: list[tuple[str, int, int, str]], shots: list[int]) -> list[list[object]]:
    """Rows (name, questions, a cell per shot number) of (name, questions, shots, cell)."""
    found: dict[tuple[str, int], dict[int, str]] = {}
    for name, questions, shot, cell in cells:
        if shot in shots:
            found.setdefault((name, questions), {})[shot] = cell
    return [[*key, *(row.get(k, "") for k in shots)] for key, row in found.items()]


def _accuracy(row: Row) -> str:
    return f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"


def _difference(pair: PairTest) -> str:
    mean, low, high = (100 * value for value in (pair.difference, pair.low, pair.high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}; p {pair.p:.1g})"
