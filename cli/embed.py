"""``lever embed``: query and candidate embeddings through an encoder."""

from __future__ import annotations

from typing import Any

from lever_train.options.embed import EmbedRequest

from .common import DEFAULT_STORE, JsonFlag, StoreOption, emit_json, notice, progress_bar
from .flags import build, with_flags


def embed(store: StoreOption = DEFAULT_STORE, json: JsonFlag = False, **flags: Any) -> None:
    """Embed the items of a split with CLIP or a text encoder; a killed call goes on."""
    from lever_train.embed.embed import embed as library

    with progress_bar("embed", "items") as advance:
        found = library(build(EmbedRequest, flags, store=store), advance)
    queries, candidates = found.queries, found.candidates
    if json:
        emit_json(
            {
                "queries": queries.run,
                "candidates": candidates.run,
                "names": [queries.details["name"], candidates.details["name"]],
                "files": [str(path) for path in found.files],
                "failed": found.failed,
            }
        )
        return
    names = dict.fromkeys(run.details["name"] for run in (queries, candidates))
    state = "embedded" if found.is_new else "already embedded"
    print(f"{state}: {queries.num_rows:,} items as {', '.join(names)}")
    for index, reason in found.failed.items():
        notice(f"item {index} has a vector of zeros: {reason}")
    for path in found.files:
        notice(f"wrote {path}")


embed = with_flags(embed, EmbedRequest)
