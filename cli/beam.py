"""``lever beam``: InfoScore beams, the data of supervised training."""

from __future__ import annotations

from typing import Annotated

from lever_data.options import Without
from lever_data.vocabulary import JsonFile
from lever_train.options.rollout import BeamShape, Execution, Request

from .common import emit, notice, progress_bar
from .flags import with_flags

# what only proposals and texts need
OFF = Without(
    *("recipe", "target_view", "from_view", "checkpoint", "budget", "shots"),
    *("log_probs", "max_new_tokens", "num_beams", "length_penalty", "stop"),
)


@with_flags
def beam(
    request: Annotated[Request, OFF],
    shape: BeamShape,
    execution: Execution,
    json: JsonFile = None,
) -> None:
    """Search each pool for the demonstrations that raise the log-probability of the ground truth
    most (InfoScore), for `lever train --stage sft`."""
    from lever_train.rollout.answerers.outages import knock

    knock(request.answerer.spec)  # before torch is imported: its seconds are waited for the server
    from lever_train.rollout.infoscore import search_beams

    with progress_bar("beam", "queries") as advance:
        outcome = search_beams(request.but(recipe=shape.recipe()), execution, advance)
    report = outcome.report
    if report.failed:
        notice(f"{report.failed:,} prompts could not be scored; their sequences are left out")
    name = outcome.run.run if outcome.run else None
    if emit({"run": name, "already": outcome.already, **vars(report)}, json):
        return
    if name is None:
        print(f"{outcome.missing:,} shards are left to others; nothing is committed yet")
    else:
        head = "already searched as" if outcome.already else "searched"
        print(f"{head} {name}: {report.candidates:,} beams of {report.queries:,} queries")
