"""``lever predict``: the demonstrations a selector picks, for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lever_train.options.evaluate import EvalRequest, Questions

from .common import DEFAULT_STORE, RunsOption, StoreOption, notice
from .flags import build, with_flags


def predict(
    out: Annotated[
        Path, typer.Option("--out", help="JSON lines, or Parquet by the name's ending.")
    ],
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="The selector.")],
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    shot_num: Annotated[int, typer.Option(help="Demonstrations to pick.", min=1)] = 4,
    limit: Annotated[int | None, typer.Option(help="The first so many questions.", min=1)] = None,
    device: Annotated[str, typer.Option(help="Where the selector runs.")] = "cpu",
    **flags: Any,
) -> None:
    """Write the picked demonstrations of every question: pointer and question ids, in order."""
    from lever_data.store.files import require_writable
    from lever_train.evaluate.api import predict as library
    from lever_train.evaluate.predictions import write_picks
    from lever_train.options.evaluate import Contest

    require_writable([out])
    contest = Contest(
        shots=(shot_num,), limit=() if limit is None else (limit,), device=device, oracle="no"
    )
    request = EvalRequest(store, (checkpoint,), build(Questions, flags), contest, runs=tuple(run))
    picks = library(request)
    write_picks(picks, out)
    notice(f"wrote {picks.num_rows:,} picks to {out}")


predict = with_flags(predict, Questions)
