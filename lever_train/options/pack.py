"""What the user asks of a selector outside an evaluation: picks, a pack, a server."""

from __future__ import annotations

from pathlib import Path

from lever_data.options import Section, option
from lever_data.vocabulary import DEFAULT_STORE, Dataset, StorePath


class SelectRequest(Section):
    """Which selector, and the demonstrations it may show."""

    checkpoint: Path = option(..., "The selector.", metavar="CHECKPOINT", argument=True)
    store: StorePath = DEFAULT_STORE
    candidate_embeddings: str = option(
        ...,
        "Vectors of the demonstrations: a file, or a name in the store; row = example id.",
        metavar="FILE|NAME",
        everyday=True,
    )
    dataset: Dataset = None
    candidate_split: str = option("train", "Split of the demonstrations.", metavar="NAME")
    pool_size: int | None = option(
        64,
        "A question chooses among this many, the most similar.",
        metavar="K",
        everyday=True,
        ge=1,
    )
    cells: bool = option(
        False,
        "Look for similar examples in the nearest cells of them only: for hundreds of thousands.",
        "--cells/--no-cells",
    )
    encoder: str | None = option(
        None,
        "Text encoder that made the vectors, so that texts can be asked for. Default: what the "
        "store says of them.",
        metavar="NAME",
    )


class PackRequest(SelectRequest):
    """What to pack, and where to."""

    out: Path = option(..., "Folder to write; it must not be there.", metavar="DIR", everyday=True)


class ServeRequest(Section):
    """What to serve, and to whom."""

    folder: Path = option(..., "Folder that `lever pack` wrote.", metavar="DIR", argument=True)
    host: str = option(
        "127.0.0.1", "Address to listen at; another than this machine's lets others ask."
    )
    port: int = option(8750, "Port to listen at.", everyday=True, ge=1, le=65535)
    max_bytes: int = option(16_000_000, "Bytes of the largest request.", metavar="N", ge=1)
    max_questions: int = option(4096, "Questions of the largest request.", metavar="N", ge=1)
