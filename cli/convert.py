"""``lever convert``: a checkpoint as the older format v2format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lever_data.options import words
from lever_data.vocabulary import JsonFile

from .common import emit, notice
from .flags import with_flags


@with_flags
def convert(
    checkpoint: Annotated[Path, words("A checkpoint: v3, v2 or v2format.", argument=True)],
    out: Annotated[
        Path | None,
        words(
            "The file to write. Default: <stem>_v2format.ckpt beside it.",
            metavar="FILE",
            everyday=True,
            output=True,
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Write a checkpoint as <stem>_v2format.ckpt; all its attention layers are kept."""
    from lever_train.selector import checkpoint as checkpoints

    path, found = checkpoints.convert(checkpoint, out)
    if found.foreign:
        notice(f"not the selector's, left out: {', '.join(found.foreign)}")
    notice(f"note: {checkpoints.legacy_caveat(found.config)}")
    if not emit({"checkpoint": str(path), "selector": found.entry()}, json):
        print(path)
