"""``lever beam``: InfoScore beams, the data of supervised training."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lever_train.options.rollout import AnswererSpec, Inputs, Recipe, Request, Which

from .common import (
    DEFAULT_STORE,
    JsonFlag,
    RunsOption,
    SqlDirOption,
    StoreOption,
    emit_json,
    notice,
    progress_bar,
)
from .flags import build, with_flags
from .generate import read_part


def beam(
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    sql_dir: SqlDirOption = None,
    beam_size: Annotated[int, typer.Option(help="Sequences kept.")] = 5,
    shard: Annotated[str, typer.Option(help="i/n: only the shards of machine i of 0…n-1.")] = "0/1",
    json: JsonFlag = False,
    **flags: Any,
) -> None:
    """Search each pool for the demonstrations that raise the log-probability of the ground truth
    most (InfoScore), for `lever train --stage sft`."""
    from dataclasses import replace

    from lever_train.rollout.generate import Execution
    from lever_train.rollout.infoscore import search_beams

    inputs = build(Inputs, flags)
    request = build(
        Request,
        flags,
        which=build(Which, flags, store=store, runs=tuple(run), sql_dir=sql_dir),
        inputs=inputs,
        recipe=Recipe(num_beams=beam_size),
        answerer=replace(build(AnswererSpec, flags), device=inputs.device),
    )
    with progress_bar("beam", "queries") as advance:
        outcome = search_beams(request, Execution(part=read_part(shard)), advance)
    report = outcome.report
    if report.failed:
        notice(f"{report.failed:,} prompts could not be scored; their sequences are left out")
    name = outcome.run.run if outcome.run else None
    if json:
        emit_json({"run": name, "already": outcome.already, **vars(report)})
    elif name is None:
        print(f"{outcome.missing:,} shards are left to others; nothing is committed yet")
    else:
        head = "already searched as" if outcome.already else "searched"
        print(f"{head} {name}: {report.candidates:,} beams of {report.queries:,} queries")


beam = with_flags(
    beam,
    Which,
    Inputs,
    AnswererSpec,
    Request,
    leave_out=(
        "target_view",
        "from_view",
        "checkpoint",
        "budget",
        "shots",
        "log_probs",
        "max_new_tokens",
        "num_beams",
        "length_penalty",
    ),
)
