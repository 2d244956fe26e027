"""The items of one file as columns, and the rows of the examples table that they become. The place
of a question in its file, or among the sorted question ids, is its query id and its example id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import LeverError
from lever_data.items.items import image_file, official_id
from lever_data.items.prompts import Id
from lever_data.readers.source import Source
from lever_data.sources.ingest_options import Order
from lever_data.store import schema
from lever_data.store.store import Run

_ROWS = 50_000
_SUBTYPE = re.compile(r"(train|val|test)(?:-[a-z]+)?(\d{4})")


@dataclass
class ItemFile:
    """The items of one file as columns, and the members beside the list.

    ``question_ids`` and ``image_ids`` may mix integers and text; the other columns are Arrow's.
    ``numbers``: the place of every row in the file, which counts what was left out. ``skipped``:
    with salvage, what was left out and why, by the id it would have (``None``: not readable).
    """

    source: Source
    question_ids: list[Id] = field(default_factory=list)
    image_ids: list[Id | None] = field(default_factory=list)
    columns: dict[str, pa.ChunkedArray] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    head: dict[str, Any] = field(default_factory=dict)
    skipped: list[tuple[Id | None, str]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Items read."""
        return len(self.numbers)


def split_of(subtype: str | None) -> str | None:
    """``train2014`` → ``train``; ``None`` where the name says nothing."""
    match = _SUBTYPE.fullmatch(subtype or "")
    return match.group(1) if match else None


def place_of(questions: ItemFile, order: Order) -> list[int]:
    """The example id of every row: its place in the file, or among the sorted question ids.

    What was left out keeps its place, so that the ids of the others are those of the whole file.

    Raises:
        LeverError: by question id, and something left out has none that can be read.
    """
    if order == "file":
        return questions.numbers
    ids = set(questions.question_ids)
    for question_id, why in questions.skipped:
        if question_id is None:
            raise LeverError(
                "a broken question has no id that can be read, and the others no number then",
                where=str(questions.source.path),
                value=why,
                hint="mend it in the file, or --order file",
            )
        ids.add(question_id)
    ranks = {number: rank for rank, number in enumerate(sorted(ids, key=_id_key))}
    return [ranks[number] for number in questions.question_ids]


def is_sorted(questions: ItemFile) -> bool:
    """Whether the file lists its questions by their ids, so that both orders are one."""
    keys = list(map(_id_key, questions.question_ids))
    return keys == sorted(keys)


def _id_key(value: Id) -> tuple[bool, Id]:
    """Integers by value, before texts by their letters."""
    return isinstance(value, str), value


def example_batches(
    questions: ItemFile,
    annotations: ItemFile | None,
    place: tuple[str, str],
    numbers: Sequence[int],
    image_name: str | None = None,
) -> Iterator[pa.Table]:
    """Rows of the examples table, by their ids.

    Args:
        place: dataset and split.
        numbers: the example id of every question, see :func:`place_of`.
        image_name: names the image files in place of what the file says.

    Raises:
        LeverError: an annotation has no question, or no question has an annotation.
    """
    columns = dict(questions.columns)
    if annotations is not None:
        rows = pa.array(match(questions, annotations), pa.int64())
        columns |= {name: annotations.columns[name].take(rows) for name in ("answers", "answer")}
    folder = _image_folder(questions.head)
    columns |= {
        "dataset": pa.repeat(place[0], len(numbers)),
        "split": pa.repeat(place[1], len(numbers)),
        "example_id": pa.array(numbers, pa.int64()),
        "question_id": schema.id_array(questions.question_ids),
        "image_id": schema.id_array(questions.image_ids),
    }
    fields = [f.with_type(columns[f.name].type) for f in schema.EXAMPLES]
    fields += [schema.EXTRA] if "extra" in columns else []
    table = pa.table([columns[f.name] for f in fields], schema=pa.schema(fields))
    order = np.argsort(np.asarray(numbers), kind="stable")
    is_in_order = bool((order == np.arange(len(order))).all())
    at = table.schema.get_field_index("image_path")
    for start in range(0, table.num_rows, _ROWS):
        rows = order[start : start + _ROWS]
        # taking copies the texts of all chunks, a slice none
        part = table.slice(start, len(rows)) if is_in_order else table.take(rows)
        ids = (questions.image_ids[row] for row in rows)
        paths = [
            image_file(image_name, image_id) if image_name else path or _coco_path(image_id, folder)
            for path, image_id in zip(part["image_path"].to_pylist(), ids, strict=True)
        ]
        yield part.set_column(at, part.schema.field(at), pa.array(paths, pa.string()))


def annotator_counts(questions: ItemFile, annotations: ItemFile | None) -> list[int]:
    """How many questions have 0, 1, 2, 3, and 4 or more answers.

    Raises:
        LeverError: an annotation belongs to no question.
    """
    answers = questions.columns["answers"]
    if annotations is not None:
        rows = pa.array(match(questions, annotations), pa.int64())
        answers = annotations.columns["answers"].take(rows)
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in answers.chunks])
    return [int(n) for n in np.bincount(np.minimum(lengths, 4), minlength=5)]


def stored_items(source: Source, run: Run) -> ItemFile:
    """The questions of an examples run, in the order of their ids there.

    Args:
        source: the file that is ingested with them.
    """
    names = ("example_id", "question_id", "image_id", "image_path", "question", "answers", "answer")
    table = pq.read_table(run.table_files("examples"), columns=list(names))
    ids = [official_id(value) for value in table["question_id"].to_pylist()]
    images = [None if i is None else official_id(i) for i in table["image_id"].to_pylist()]
    columns = {name: table[name] for name in names[3:]}
    return ItemFile(
        source, ids, images, columns, table["example_id"].to_pylist(), dict(run.details)
    )


def match(questions: ItemFile, annotations: ItemFile) -> list[int | None]:
    """Per question the row of its annotation, ``None`` where it has none.

    Raises:
        LeverError: an annotation belongs to no question.
    """
    rows = {number: row for row, number in enumerate(annotations.question_ids)}
    wanted = questions.question_ids
    lost = {number for number, _ in questions.skipped}
    strangers = rows.keys() - set(wanted) - lost
    if strangers:
        raise LeverError(
            f"{len(strangers)} of {len(rows)} annotations belong to no question of "
            f"{questions.source.path}",
            where=str(annotations.source.path),
            value=f"question_id {min(strangers, key=_id_key)}",
            hint="questions and annotations must be of the same split",
        )
    return [rows.get(number) for number in wanted]


def _image_folder(head: dict[str, Any]) -> str | None:
    """``train2014`` where the images are COCO's; ``test-dev2015`` shares the images of test2015."""
    match = _SUBTYPE.fullmatch(str(head.get("data_subtype")))
    if match is None or head.get("data_type", "mscoco") != "mscoco":
        return None
    return match.group(1) + match.group(2)


def _coco_path(image_id: Id | None, folder: str | None) -> str | None:
    """``train2014/COCO_train2014_000000000042.jpg``, as COCO names its files."""
    if folder is None or not isinstance(image_id, int):
        return None
    return f"{folder}/COCO_{folder}_{image_id:012d}.jpg"
