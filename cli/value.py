"""``lever value``: what a selector would earn, before anything is asked."""

from __future__ import annotations

from lever_data.vocabulary import JsonFile
from lever_train.options.value import ValueRequest

from .common import emit, emit_table
from .flags import with_flags


@with_flags
def value(request: ValueRequest, json: JsonFile = None) -> None:
    """Estimate the reward of selectors from stored candidates; no model is asked."""
    from dataclasses import asdict

    from lever_train.evaluate.value import value

    found = value(request)
    if emit([asdict(one) for one in found], json):
        return
    emit_table(
        ["checkpoint", "doubly robust", "from", "to", "SNIPS", "direct", "support", "effective",
         "queries"],
        [[one.checkpoint, one.doubly_robust.mean, one.doubly_robust.low, one.doubly_robust.high,
          one.snips.mean, one.direct.mean, one.support, one.effective, one.queries]
         for one in found],
    )  # fmt: skip
