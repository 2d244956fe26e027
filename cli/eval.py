"""``lever eval``: checkpoints on held-out questions, beside the baselines they have to beat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lever_train.eval_request import Contest, EvalRequest, Questions
from lever_train.rollout.request import AnswererSpec

from .common import DEFAULT_STORE, RunsOption, StoreOption, emit_table, notice, progress_bar
from .flags import build, with_flags

if TYPE_CHECKING:
    from lever_train.scoreboard import Scoreboard


def evaluate(
    checkpoint: Annotated[
        list[Path],
        typer.Option("--checkpoint", help="A selector: v3, v2 or v2format (repeatable)."),
    ] = [],  # noqa: B006 - typer copies it
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the scoreboard as JSON.", metavar="FILE")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a chart as one page.", metavar="FILE")
    ] = None,
    **flags: Any,
) -> None:
    """Evaluate selectors at 1-4 shots: VQA accuracy with intervals and paired differences.

    Zero-shot, random and nearest-neighbour are always beside them, and the best of the pool where
    the answerer is cheap (exact at one shot, a lower bound at more).
    """
    from lever_train.evaluation import run_evaluation
    from lever_train.scoreboard import write_json
    from lever_train.scoreboard_page import write_page

    request = EvalRequest(
        store=store,
        checkpoints=tuple(checkpoint),
        questions=build(Questions, flags),
        contest=build(Contest, flags),
        answerer=build(AnswererSpec, flags),
        runs=tuple(run),
    )
    with progress_bar("eval", "answers") as advance:
        found = run_evaluation(request, advance)
    board = found.scoreboard
    show_scoreboard(board)
    if json is not None:
        write_json(board, json)
        notice(f"wrote {json}")
    if html is not None:
        write_page(board, html)
        notice(f"wrote {html}")
    notice(f"{'committed' if found.is_new else 'already evaluated'} as {board.run}")


evaluate = with_flags(evaluate, Questions, Contest, AnswererSpec)


def show_scoreboard(board: Scoreboard) -> None:
    """Two tables: the accuracies, and the paired differences."""
    emit_table(
        ["selector", "shots", "accuracy", "low", "high", "n", "failed"],
        [
            [
                f"{r.selector} (lower bound)"
                if r.selector == "oracle" and r.shots > 1
                else r.selector,
                r.shots,
                f"{r.accuracy:.2%}",
                f"{r.low:.2%}",
                f"{r.high:.2%}",
                r.n,
                r.failed,
            ]
            for r in board.rows
        ],
        title="VQA accuracy, with 95 % intervals",
    )
    if board.paired:
        emit_table(
            ["difference", "shots", "points", "low", "high", "McNemar p", "n"],
            [
                [
                    f"{p.a} − {p.b}",
                    p.shots,
                    f"{100 * p.difference:+.2f}",
                    f"{100 * p.low:+.2f}",
                    f"{100 * p.high:+.2f}",
                    f"{p.p:.2g}",
                    p.n,
                ]
                for p in board.paired
            ],
            title="\nPaired by question, in percentage points",
        )
    failed = sum(r.failed for r in board.rows)
    if failed:
        notice(f"{failed:,} answers failed; they are left out of the means")
