"""The dataset items of a job: queries and demonstrations, from the store or the official files.

In go a connection, a (dataset, split) and, where given, the official files; out come
:class:`Item` records by id. What was ingested is official; files named again take its place as the
ground truth that scores a query (``Truth``), and must be of the same questions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Id, Item

if TYPE_CHECKING:
    import duckdb

# what is read of items, their vectors and pools: all that most commands define
ITEM_RELATIONS = ("candidates", "queries", "examples", "embeddings")


@dataclass(frozen=True)
class Place:
    """Where items come from: a split, and the folder their images lie in.

    ``image_name``: names image files in place of what is stored, as ``{image_id}.jpg``.
    """

    dataset: str
    split: str
    image_root: Path | None = None
    image_name: str | None = None


@dataclass(frozen=True)
class Question:
    """A question of the official files."""

    question_id: Id
    question: str
    image_id: Id | None = None
    image_path: str | None = None


@dataclass(frozen=True)
class Official:
    """The official files of one split: questions by query id, annotators' answers by their ids."""

    questions: dict[int, Question]
    answers: dict[Id, tuple[str, ...]]
    by_id: dict[Id, Question] = field(init=False)

    def __post_init__(self) -> None:
        by_id = {asked.question_id: asked for asked in self.questions.values()}
        object.__setattr__(self, "by_id", by_id)


def load_items(
    con: duckdb.DuckDBPyConnection, place: Place, official: Official | None = None
) -> dict[int, Item]:
    """The items of a split by id, from the table ``examples``, else from the official files, else
    from the table ``queries`` (which covers only the queries that have candidates).

    Args:
        official: the files of this very split; ``None`` where they are of another or not given.

    Raises:
        LeverError: none of the three knows the split, the files are of other questions than the
            table, or the stored queries are other questions than the examples of their ids.
    """
    key = [place.dataset, place.split]
    rows = con.cursor().execute(_EXAMPLES, key).fetchall()
    if rows:
        require_same_questions(con, place.dataset, place.split)
    elif official is None:
        rows = con.cursor().execute(_QUERIES, key).fetchall()
    else:
        rows = [
            (n, q.question_id, q.image_id, q.image_path, q.question, said, None, True, None)
            for n, q in official.questions.items()
            for said in [official.answers.get(q.question_id, ())]
        ]
        official = None
    if not rows:
        raise LeverError(
            "the store has no examples of this split",
            where=f"{place.dataset}/{place.split}",
            hint="`lever ingest QUESTIONS ANNOTATIONS --store S --dataset D --split S`, or give "
            "--questions and --annotations",
        )
    items = _items(place, rows)
    if official is not None:
        _require_known(items, official)
    return items


def some_items(con: duckdb.DuckDBPyConnection, place: Place, ids: Iterable[int]) -> dict[int, Item]:
    """The items with these ids, from the table ``examples``, else as the table ``queries`` tells
    them; unknown ids are left out."""
    key = [place.dataset, place.split, sorted({*ids})]
    found = _items(place, con.cursor().execute(_SOME_EXAMPLES, key).fetchall())
    if len(found) < len(key[2]):
        found = {**_items(place, con.cursor().execute(_SOME_QUERIES, key).fetchall()), **found}
    return found


_SOME_EXAMPLES = """
    select example_id, question_id, image_id, image_path, question, answers, answer, true, extra
    from examples
    where dataset = ? and split = ? and example_id in (select unnest(?::bigint[]))
    order by example_id
"""
_SOME_QUERIES = """
    select query_id, question_id, image_id, null, question, gt_answers, null, false, null
    from queries
    where
        dataset = ? and split = ? and query_id in (select unnest(?::bigint[]))
        and question is not null
    order by query_id
"""
_EXAMPLES = """
    select example_id, question_id, image_id, image_path, question, answers, answer, true, extra
    from examples
    where dataset = ? and split = ? and example_id in (select unnest(?::bigint[]))
    order by example_id
"""
_EXAMPLES = """
    select example_id, question_id, image_id, image_path, question, answers, answer, true, extra
    from examples
    where dataset = ? and split = ?
    order by example_id
"""
_QUERIES = """
    select query_id, question_id, image_id, null, question, gt_answers, null, false, null
    from queries
    where dataset = ? and split = ? and question is not null
    order by query_id
"""


def _items(place: Place, rows: Sequence[tuple[Any, ...]]) -> dict[int, Item]:
    ids = [official_id(row[2]) for row in rows]
    images = _images(place, [(row[3], image_id) for row, image_id in zip(rows, ids, strict=True)])
    return {
        number: Item(
            place.dataset,
            place.split,
            number,
            question,
            tuple(answers or ()),
            majority(answers or ()) if answer is None else answer,
            image,
            official_id(question_id),
            image_id,
            is_official,
            {} if extra is None else json.loads(extra),
        )
        for (
            number,
            question_id,
            _,
            _,
            question,
            answers,
            answer,
            is_official,
            extra,
        ), image_id, image in (zip(rows, ids, images, strict=True))
    }


@overload
def official_id(value: Id) -> Id: ...
@overload
def official_id(value: None) -> None: ...
def official_id(value: Id | None) -> Id | None:
    """An id as official files write it: an integer where it is one in plain decimal, else text.

    ``305`` and ``"305"`` are one id; ``"004420"`` is another than ``4420``.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and str(int(value)) == value:
        return int(value)
    return value


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


def majority(answers: Sequence[str]) -> str | None:
    """The answer most annotators gave, the first of equals; ``None`` without answers."""
    return Counter(answers).most_common(1)[0][0] if answers else None


def _images(place: Place, known: Sequence[tuple[str | None, Id | None]]) -> list[Path | None]:
    """Image files: by the pattern, as stored, or under the name COCO gives them; below the image
    root, or in it where it is the split's own folder already (the first image decides for all)."""
    root, folder = place.image_root, f"{place.split}2014"
    if root is None:
        return [None] * len(known)
    paths = [
        image_file(place.image_name, image_id)
        if place.image_name is not None
        else f"{folder}/COCO_{folder}_{image_id:012d}.jpg"
        if path is None and isinstance(image_id, int)
        else path
        for path, image_id in known
    ]
    first = next((p for p in paths if p is not None), None)
    flat = first is not None and not (root / first).exists() and (root / Path(first).name).exists()
    return [p if p is None else root / (Path(p).name if flat else p) for p in paths]


def image_file(pattern: str, image_id: Id | None) -> str | None:
    """The file a pattern such as ``{image_id}.jpg`` or ``COCO_{image_id:012d}.jpg`` names.

    Raises:
        UsageError: the pattern names something else than the image's id, or does not fit it.
    """
    if image_id is None:
        return None
    try:
        return pattern.format(image_id=image_id)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--image-name does not fit the image ids ({error})",
            value=f"{pattern} for {image_id!r}",
            hint="--image-name '{image_id}.jpg'",
        ) from None


def require_images(items: Iterable[Item]) -> None:
    """Refuse items of an image task that have no image, or none of whose images is there.

    Raises:
        LeverError: it counts them and names the first.
    """
    found = list(items)
    blind = [item for item in found if item.image is None]
    if blind:
        raise LeverError(
            f"{len(blind):,} of {len(found):,} items have no image",
            where=f"item {blind[0].example_id} of {blind[0].dataset}/{blind[0].split}, "
            f"question {blind[0].question_id}",
            hint="--image-name '{image_id}.jpg' says how the files are named; --without-images "
            "goes without",
        )
    # one that is missing fails alone, in its row; a wrong folder misses all
    images = [item.image for item in found if item.image is not None][:100]
    if images and not any(image.exists() for image in images):
        raise LeverError(
            "the images are not in this folder",
            where=str(images[0]),
            hint="--image-root DIR names the folder, --image-name '{image_id}.jpg' the files in it",
        )


def require_same_questions(con: duckdb.DuckDBPyConnection, dataset: str, split: str) -> None:
    """Refuse a split whose queries are other questions than the examples of their ids: every
    pointer of such data, too, would be read as another example.

    Raises:
        LeverError: it names both question ids, and what may put them right.
    """
    found = con.cursor().execute(_OTHER_QUESTIONS, [dataset, split]).fetchall()
    if found:
        query_id, ours, theirs = found[0]
        raise other_question(query_id, f"{dataset}/{split}", ours, theirs)


_OTHER_QUESTIONS = """
    select queries.query_id, queries.question_id, examples.question_id
    from queries
    inner join examples
        on queries.dataset = examples.dataset
        and queries.split = examples.split
        and queries.query_id = examples.example_id
    where
        queries.dataset = ? and queries.split = ?
        and queries.question_id <> examples.question_id
    order by queries.query_id
    limit 1
"""


def other_question(query_id: int, place: str, ours: Id, theirs: Id) -> LeverError:
    """The error that RL data (``ours``) and examples (``theirs``) number other questions."""
    return LeverError(
        "the RL data and the examples give a query different questions",
        where=f"query {query_id} of {place}",
        value=f"question {ours} in the RL data, {theirs} in the examples",
        hint="ingest questions and annotations in the order of the RL data: legacy data numbers "
        "them by question_id (--order question_id), else they are numbered as in the file "
        "(--order file); or remove the run that is of another split (`lever runs rm`)",
    )


def _require_known(items: Mapping[int, Item], official: Official) -> None:
    """The files named must be of the questions that are stored: the same ids, the same words."""
    for number, item in items.items():
        if item.question_id is None:
            continue
        asked = official.by_id.get(item.question_id)
        if asked is None or asked.question != item.question:
            found = "it is not in the file" if asked is None else repr(asked.question)
            raise LeverError(
                "the questions file is not that of the stored split: a question is another one",
                where=f"query {number} of {item.dataset}/{item.split}, question {item.question_id}",
                value=f"{found}; {item.question!r} in the store",
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
    items: Mapping[int, Item], official: Official | None = None, *, allow_fallback: bool = False
) -> dict[int, Truth]:
    """The ground truth of every query in ``items``: of the files given, else as it was ingested.

    Raises:
        LeverError: a query has no official annotation and fallback is not allowed, or has no
            answers of any kind.
    """
    truths: dict[int, Truth] = {}
    lacking: list[int] = []
    for number, item in items.items():
        known = item.answers if item.is_official else ()
        if official is not None:
            known = () if item.question_id is None else official.answers.get(item.question_id, ())
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
            hint="`lever ingest QUESTIONS ANNOTATIONS` stores the official answers of a split, "
            "--questions and --annotations name them for this command alone; --allow-fallback "
            "scores by string matching instead, and says so in every row",
        )
    return truths
