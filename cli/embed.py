"""``lever embed``: query and candidate embeddings through an encoder."""

from __future__ import annotations

from lever_data.vocabulary import JsonFile
from lever_train.options.embed import EmbedRequest
from lever_train.options.engine import Engine

from .common import emit, notice, progress_bar
from .flags import with_flags


@with_flags
def embed(request: EmbedRequest, engine: Engine, json: JsonFile = None) -> None:
    """Embed the items of a split with CLIP or a text encoder; a killed call goes on."""
    from lever_train.embed.embed import embed as library

    with progress_bar("embed", "items") as advance:
        found = library(request, advance, engine)
    queries, candidates = found.queries, found.candidates
    figures = {
        "queries": queries.run,
        "candidates": candidates.run,
        "names": [queries.details["name"], candidates.details["name"]],
        "files": [str(path) for path in found.files],
        "failed": found.failed,
    }
    if emit(figures, json):
        return
    names = dict.fromkeys(run.details["name"] for run in (queries, candidates))
    state = "embedded" if found.is_new else "already embedded"
    print(f"{state}: {queries.num_rows:,} items as {', '.join(names)}")
    for index, reason in found.failed.items():
        notice(f"item {index} has a vector of zeros: {reason}")
    for path in found.files:
        notice(f"wrote {path}")
