"""How to ingest: the options of ``lever ingest``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from lever_data.items.task import TaskGiven
from lever_data.options import Section, option
from lever_data.vocabulary import Dataset, Split

Reader = Literal["notes", "newest"]  # states of the legacy code: of its notes, and of 2025-12-29
Order = Literal["file", "question_id"]


class Columns(Section):
    """Which columns of a data set mean what. Default: guessed by their names, and shown."""

    input: str | None = option(None, "Column of the input, such as the question.", metavar="COLUMN")
    answers: str | None = option(None, "Column of the answers.", metavar="COLUMN")
    image: str | None = option(
        None, "Column of the image: its file, or the picture itself.", metavar="COLUMN"
    )
    context: str | None = option(None, "Column that templates show as {context}.", metavar="COLUMN")
    choices: str | None = option(None, "Column of the choices to choose from.", metavar="COLUMN")
    id: str | None = option(None, "Column of the ids, integers or text.", metavar="COLUMN")
    field: tuple[str, ...] = option(
        (), "A further column, and what templates call it.", metavar="NAME=COLUMN"
    )


class IngestOptions(Section):
    """How to ingest.

    Without ``dataset`` it is called ``default``; without ``split`` questions and annotations say it
    themselves and everything else is ``train``.
    """

    dataset: Dataset = None
    split: Split = None
    name: str | None = option(
        None,
        "Name of texts, embeddings or results in the store. Default: the file's stem.",
        metavar="NAME",
    )
    order: Order = option(
        "file",
        "What numbers questions: their place in the file, or that among the sorted question ids, "
        "as in all legacy data.",
    )
    task: TaskGiven = None
    image_name: str | None = option(
        None,
        "Names the image files in place of what the questions say: '{image_id}.jpg'.",
        metavar="PATTERN",
    )
    shots: int = option(
        0, "Demonstrations shown for the predictions of a results file.", metavar="N", ge=0
    )
    columns: Columns = Field(default_factory=Columns)
    salvage: bool = option(False, "Commit what is whole of a broken file, list what is not.")
    # no options: told (bytes read, bytes in all) of a file, and what was assumed, a line at a time
    progress: Callable[[int, int], None] | None = None
    notice: Callable[[str], None] = lambda _: None
