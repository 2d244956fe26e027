"""The official VQA files as lookups: questions in file order, answers by question id.

In go the questions and annotations files (plain, gzip or zstd); out comes an :class:`Official`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from lever_data.errors import LeverError
from lever_data.files import sha256_file
from lever_data.source import Source


class _Question(msgspec.Struct):
    question_id: int
    question: str
    image_id: int | None = None


class _Questions(msgspec.Struct):
    questions: list[_Question]


class _Said(msgspec.Struct):
    answer: str


class _Annotation(msgspec.Struct):
    question_id: int
    answers: list[_Said]


class _Annotations(msgspec.Struct):
    annotations: list[_Annotation]


_File = TypeVar("_File", _Questions, _Annotations)


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
    answers by question id. ``digest``: sha256 of both files, part of a run's identity.
    """

    questions: list[Question]
    answers: dict[int, tuple[str, ...]]
    digest: str


def load_official(questions: Path, annotations: Path) -> Official:
    """Read both files.

    Raises:
        LeverError: a file cannot be read or is not of its kind, an annotation has no answers, or
            the two files have no question in common.
    """
    asked = _decode(questions, _Questions, "questions").questions
    noted = _decode(annotations, _Annotations, "annotations").annotations
    answers: dict[int, tuple[str, ...]] = {}
    for annotation in noted:
        if not annotation.answers:
            raise LeverError(
                "an annotation has no answers",
                where=str(annotations),
                value=annotation.question_id,
            )
        answers[annotation.question_id] = tuple(said.answer for said in annotation.answers)
    found = [Question(q.question_id, q.question, q.image_id) for q in asked]
    if found and not any(q.question_id in answers for q in found):
        raise LeverError(
            "no question of the one file is annotated in the other",
            where=f"{questions} and {annotations}",
            hint="give both files of one split",
        )
    return Official(found, answers, sha256_file(questions)[:16] + sha256_file(annotations)[:16])


def _decode(path: Path, kind: type[_File], what: str) -> _File:
    chunks: list[bytes] = []
    with Source.open(path).reader() as reader:
        while chunk := reader.read(1 << 20):
            chunks.append(chunk)
    try:
        return msgspec.json.decode(b"".join(chunks), type=kind)
    except msgspec.DecodeError as error:
        raise LeverError(
            f"this is not an official VQA {what} file ({error})", where=str(path)
        ) from error
