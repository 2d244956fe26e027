"""The dataset items of a job: queries and demonstrations, from the store or the official files.

In go a connection, a (dataset, split) and, where given, the official files; out come
:class:`Item` records by id. An item keeps what an answerer may show; the ground truth that scores
a query stands apart (``Truth``), because the official files have the last word on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from lever_data.errors import LeverError, UsageError
from lever_data.items.official import Official
from lever_data.items.prompts import Item


@dataclass(frozen=True)
class Place:
    """Where items come from: a split, and the folder their images lie in."""

    dataset: str
    split: str
    image_root: Path | None = None


def load_items(
    con: duckdb.DuckDBPyConnection, place: Place, official: Official | None
) -> dict[int, Item]:
    """The items of a split by id, from the table ``examples``, else from the official files, else
    from the table ``queries`` (which covers only the queries that have candidates).

    Args:
        official: the files of this very split; ``None`` where they are of another or not given.

    Raises:
        LeverError: none of the three knows the split, or the files and the table disagree.
    """
    stored = _from_examples(con, place)
    if stored:
        if official is not None:
            _require_same_order(stored, official)
        return stored
    found = _from_official(place, official) if official is not None else _from_queries(con, place)
    if not found:
        raise LeverError(
            "the store has no examples of this split",
            where=f"{place.dataset}/{place.split}",
            hint="`lever ingest QUESTIONS ANNOTATIONS --store S --dataset D --split S`, or give "
            "--questions and --annotations",
        )
    return found


def only_dataset(con: duckdb.DuckDBPyConnection) -> str:
    """The dataset of the examples, where there is just one.

    Raises:
        UsageError: there are several, or none.
    """
    found = con.cursor().execute("select distinct dataset from examples order by 1").fetchall()
    if len(found) == 1:
        return str(found[0][0])
    raise UsageError(
        "the store holds examples of several datasets, or of none",
        value=", ".join(str(row[0]) for row in found) or None,
        hint="--dataset NAME; `lever ingest QUESTIONS ANNOTATIONS` makes examples",
    )


def _from_examples(con: duckdb.DuckDBPyConnection, place: Place) -> dict[int, Item]:
    rows = con.cursor().execute(
        "select example_id, question_id, image_id, image_path, question, answers, answer "
        "from examples where dataset = ? and split = ? order by example_id",
        [place.dataset, place.split],
    )
    found = rows.fetchall()
    images = _images(place, ((row[3], row[2]) for row in found))
    return {
        number: Item(
            place.dataset,
            place.split,
            number,
            question,
            tuple(answers or ()),
            answer or majority(answers or ()),
            image,
            question_id,
            image_id,
        )
        for (number, question_id, image_id, _, question, answers, answer), image in zip(
            found, images, strict=True
        )
    }


def _from_queries(con: duckdb.DuckDBPyConnection, place: Place) -> dict[int, Item]:
    rows = con.cursor().execute(
        "select query_id, question_id, image_id, question, gt_answers from queries "
        "where dataset = ? and split = ? and question is not null order by query_id",
        [place.dataset, place.split],
    )
    found = rows.fetchall()
    images = _images(place, ((None, row[2]) for row in found))
    return {
        number: Item(
            place.dataset,
            place.split,
            number,
            question,
            tuple(answers or ()),
            majority(answers or ()),
            image,
            question_id,
            image_id,
        )
        for (number, question_id, image_id, question, answers), image in zip(
            found, images, strict=True
        )
    }


def _from_official(place: Place, official: Official) -> dict[int, Item]:
    images = _images(place, ((None, asked.image_id) for asked in official.questions))
    return {
        number: Item(
            place.dataset,
            place.split,
            number,
            asked.question,
            official.answers.get(asked.question_id, ()),
            majority(official.answers.get(asked.question_id, ())),
            image,
            asked.question_id,
            asked.image_id,
        )
        for number, (asked, image) in enumerate(zip(official.questions, images, strict=True))
    }


def majority(answers: tuple[str, ...] | list[str]) -> str | None:
    """The answer most annotators gave, the first of equals; ``None`` without answers."""
    return Counter(answers).most_common(1)[0][0] if answers else None


def _images(place: Place, known: Iterable[tuple[str | None, int | None]]) -> list[Path | None]:
    """Image files: as stored, else under the name COCO gives them; below the image root, or in it
    where it is the split's own folder already (the first image decides for all)."""
    root, folder = place.image_root, f"{place.split}2014"
    paths = [
        f"{folder}/COCO_{folder}_{number:012d}.jpg" if path is None and number is not None else path
        for path, number in known
    ]
    if root is None:
        return [None] * len(paths)
    first = next((p for p in paths if p is not None), None)
    flat = first is not None and not (root / first).exists() and (root / Path(first).name).exists()
    return [p if p is None else root / (Path(p).name if flat else p) for p in paths]


def _require_same_order(stored: dict[int, Item], official: Official) -> None:
    """The files must be of the split the store calls so: same questions at the same index."""
    for number, item in stored.items():
        known = official.questions[number].question_id if number < len(official.questions) else None
        if known != item.question_id:
            raise LeverError(
                "the questions file is not that of the stored split: a query has another question",
                where=f"query {number} of {item.dataset}/{item.split}",
                value=f"{known} in the file, {item.question_id} in the store",
                hint="give the files the split was ingested from, or another --split",
            )


@dataclass(frozen=True)
class Truth:
    """What a query's answers are compared with.

    ``answers``: the annotators', distinct ones in ``given`` in string order. ``official``: the
    official metric applies; otherwise string matching (``fallback``).
    """

    answers: tuple[str, ...]
    official: bool
    given: tuple[str, ...]


def load_truth(
    items: Mapping[int, Item], official: Official | None, *, allow_fallback: bool
) -> dict[int, Truth]:
    """The ground truth of every query in ``items``.

    Raises:
        LeverError: a query has no official annotation and fallback is not allowed, or has no
            answers of any kind.
    """
    truths: dict[int, Truth] = {}
    lacking: list[int] = []
    for number, item in items.items():
        known = () if official is None else official.answers.get(item.question_id or -1, ())
        if not known and not allow_fallback:
            lacking.append(number)
        answers = known or item.answers
        if not answers and allow_fallback:
            raise LeverError("a query has no answers to compare with", where=f"query {number}")
        truths[number] = Truth(answers, bool(known), tuple(sorted(set(answers))))
    if lacking:
        raise LeverError(
            f"{len(lacking):,} of {len(items):,} queries have no annotation",
            where=f"query {lacking[0]}, question {items[lacking[0]].question_id}",
            hint="give the annotations of the right split, or --allow-fallback",
        )
    return truths
