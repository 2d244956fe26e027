"""The official VQA files as lookups: questions in file order, answers by question id.

In go the questions and annotations files (plain, gzip or zstd), read as ingest reads them; out
comes an :class:`Official`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lever_data.errors import LeverError
from lever_data.readers.source import Source
from lever_data.sources.questions import read_annotations, read_questions


@dataclass(frozen=True)
class Question:
    """A question of the official file."""

    question_id: int
    question: str
    image_id: int | None


@dataclass(frozen=True)
class Official:
    """Both files of one split.

    ``questions``: in file order, so that the index is the query id. ``answers``: the annotators'
    answers by question id.
    """

    questions: list[Question]
    answers: dict[int, tuple[str, ...]]


def load_official(questions: Path, annotations: Path) -> Official:
    """Read both files.

    Raises:
        LeverError: a file cannot be read or is not of its kind, an annotation has no answers, or
            the two files have no question in common.
    """
    asked = read_questions(Source.open(questions)).columns
    noted = read_annotations(Source.open(annotations)).columns
    ids = noted["question_id"].to_pylist()
    answers = {
        number: tuple(said) for number, said in zip(ids, noted["answers"].to_pylist(), strict=True)
    }
    if lacking := [number for number, said in answers.items() if not said]:
        raise LeverError("an annotation has no answers", where=str(annotations), value=lacking[0])
    names = ("question_id", "question", "image_id")
    found = [Question(*row) for row in zip(*(asked[n].to_pylist() for n in names), strict=True)]
    if not any(q.question_id in answers for q in found):
        raise LeverError(
            "no question of the one file is annotated in the other",
            where=f"{questions} and {annotations}",
            hint="give both files of one split",
        )
    return Official(found, answers)
