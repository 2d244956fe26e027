"""The official VQA files as lookups: questions by query id, answers by question id.

In go the questions and annotations files (plain, gzip or zstd), read as ingest reads them; out
comes an :class:`~lever_data.items.items.Official`.
"""

from __future__ import annotations

from pathlib import Path

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import Official, Question
from lever_data.readers.source import Source
from lever_data.sources.item_file import split_of
from lever_data.sources.questions import read_annotations, read_questions


def load_official(
    questions: Path | None, annotations: Path | None, *, split: str | None = None
) -> Official | None:
    """Read both files; ``None`` where neither is named.

    Args:
        split: refuse files that say that they are of another one.

    Raises:
        UsageError: only one of them is named.
        LeverError: a file cannot be read or is not of its kind, is of another split, or the two
            files have no question in common.
    """
    if questions is None and annotations is None:
        return None
    if questions is None or annotations is None:
        raise UsageError("--questions and --annotations go together")
    asked = read_questions(Source.open(questions))
    noted = read_annotations(Source.open(annotations))
    said = noted.columns["answers"].to_pylist()
    for file in (asked, noted):
        found = split_of(str(file.head.get("data_subtype")))
        if found and split in ("train", "val", "test") and found != split:
            raise LeverError(
                f"the file is of the split {found}, the run of {split}",
                where=str(file.source.path),
                hint="give the questions and annotations of the run's own split",
            )
    answers = {i: tuple(a) for i, a in zip(noted.question_ids, said, strict=True) if a}
    texts, paths = (asked.columns[name].to_pylist() for name in ("question", "image_path"))
    rows = zip(asked.question_ids, texts, asked.image_ids, paths, strict=True)
    listed = {number: Question(*row) for number, row in zip(asked.numbers, rows, strict=True)}
    if not any(q.question_id in answers for q in listed.values()):
        raise LeverError(
            "no question of the one file is annotated in the other",
            where=f"{questions} and {annotations}",
            hint="give both files of one split",
        )
    return Official(listed, answers)
