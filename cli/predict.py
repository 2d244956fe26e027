"""``lever predict``: the demonstrations a selector picks, for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lever_data.options import words
from lever_data.vocabulary import DEFAULT_STORE, Device, Limit, RunNames, StorePath
from lever_train.options.evaluate import Questions

from .common import notice
from .flags import with_flags


@with_flags
def predict(
    out: Annotated[
        Path,
        words("JSON lines, or Parquet by the name's ending.", metavar="FILE", output=True),
    ],
    checkpoint: Annotated[Path, words("The selector.", metavar="FILE")],
    questions: Questions,
    store: StorePath = DEFAULT_STORE,
    runs: RunNames = (),
    shot_num: Annotated[int, words("Demonstrations to pick.", everyday=True, ge=1)] = 4,
    limit: Limit = None,
    device: Device = "cpu",
) -> None:
    """Write the picked demonstrations of every question: pointer and question ids, in order."""
    from lever_train.evaluate.api import predict as library
    from lever_train.evaluate.predictions import write_picks
    from lever_train.options.evaluate import Contest, EvalRequest

    contest = Contest(shots=(shot_num,), limit=limit, device=device, oracle="no")
    picks = library(
        EvalRequest(
            store=store, checkpoints=(checkpoint,), questions=questions, contest=contest, runs=runs
        )
    )
    write_picks(picks, out)
    notice(f"wrote {picks.num_rows:,} picks to {out}")
