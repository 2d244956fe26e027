"""``lever convert``: a checkpoint as the older format v2format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonFlag, emit_json, notice


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint: v3, v2 or v2format.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write. Default: <stem>_v2format.ckpt beside it."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write a checkpoint as <stem>_v2format.ckpt; all its attention layers are kept."""
    from lever_data.store.files import require_writable
    from lever_train.selector import checkpoint as checkpoints

    if out is not None:
        require_writable([out])
    path, found = checkpoints.convert(checkpoint, out)
    if found.foreign:
        notice(f"not the selector's, left out: {', '.join(found.foreign)}")
    notice(f"note: {checkpoints.legacy_caveat(found.config)}")
    if json:
        emit_json({"checkpoint": str(path), "selector": found.entry()})
    else:
        print(path)
