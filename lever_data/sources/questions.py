"""Official VQA question and annotation files into the examples table.

In go the two files (format: visualqa.org/download), read item by item; out come Arrow batches of
:data:`~lever_data.store.schema.EXAMPLES`, one row per question in file order: the index of a
question in its file is its query id and its example id.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.readers import json_exact
from lever_data.readers.json_exact import Place
from lever_data.readers.json_object import Scanner
from lever_data.readers.source import Progress, Source
from lever_data.sources.rl import decode_typed
from lever_data.sources.types import Int64
from lever_data.store import schema

_ROWS = 50_000
_SUBTYPE = re.compile(r"(train|val|test)(?:-[a-z]+)?(\d{4})")


class _Question(msgspec.Struct, gc=False):
    question_id: Int64
    question: str
    image_id: Int64 | None = None


class _Answer(msgspec.Struct, gc=False):
    answer: str


class _Annotation(msgspec.Struct, gc=False):
    question_id: Int64
    answers: list[_Answer]
    multiple_choice_answer: str | None = None


@dataclass
class ItemFile:
    """The list of one official file as columns, and the members beside the list."""

    source: Source
    columns: dict[str, pa.ChunkedArray] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    num_rows: int = 0


def read_questions(source: Source, progress: Progress | None = None) -> ItemFile:
    """Question file → columns question_id int64, image_id int64, question string.

    Raises:
        LeverError: not valid, of other types, or a question id occurs twice.
    """
    kinds = {"question_id": pa.int64(), "image_id": pa.int64(), "question": pa.string()}

    def row(item: Any) -> tuple[Any, ...]:
        return item.question_id, item.image_id, item.question

    return _read(source, ("questions", _Question), kinds, row, progress)


def read_annotations(source: Source, progress: Progress | None = None) -> ItemFile:
    """Annotation file → columns question_id int64, answers list<string>, answer string.

    ``answer`` is ``multiple_choice_answer`` where the file has it, else the most frequent answer,
    the first of those that are equally frequent.
    """
    kinds = {
        "question_id": pa.int64(),
        "answers": pa.list_(pa.string()),
        "answer": pa.string(),
    }

    def row(item: Any) -> tuple[Any, ...]:
        answers = [answer.answer for answer in item.answers]
        chosen = item.multiple_choice_answer
        if chosen is None and answers:
            chosen = Counter(answers).most_common(1)[0][0]
        return item.question_id, answers, chosen

    return _read(source, ("annotations", _Annotation), kinds, row, progress)


def split_of(subtype: str | None) -> str | None:
    """``train2014`` → ``train``; ``None`` where the name says nothing."""
    match = _SUBTYPE.fullmatch(subtype or "")
    return match.group(1) if match else None


def example_batches(
    questions: ItemFile, annotations: ItemFile | None, dataset: str, split: str
) -> Iterator[pa.Table]:
    """Rows of the examples table, in the order of the questions.

    Raises:
        LeverError: an annotation has no question, or no question has an annotation.
    """
    table = pa.table({name: questions.columns[name] for name in questions.columns})
    folder = _image_folder(questions.head)
    where = None if annotations is None else _match(questions, annotations)
    for start in range(0, questions.num_rows, _ROWS):
        part = table.slice(start, _ROWS)
        rows = part.num_rows
        columns = {
            "dataset": pa.repeat(dataset, rows),
            "split": pa.repeat(split, rows),
            "example_id": pa.array(np.arange(start, start + rows, dtype=np.int64)),
            "image_path": _image_paths(part.column("image_id").to_pylist(), folder),
            **{name: part.column(name) for name in table.column_names},
        }
        for name in ("answers", "answer"):
            kind = schema.EXAMPLES.field(name).type
            if annotations is None or where is None:
                columns[name] = pa.nulls(rows, kind)
            else:
                columns[name] = annotations.columns[name].take(where.slice(start, rows))
        yield pa.table([columns[f.name] for f in schema.EXAMPLES], schema=schema.EXAMPLES)


def num_unanswered(questions: ItemFile, annotations: ItemFile) -> int:
    """Questions without an annotation; ids within a file are unique."""
    return questions.num_rows - annotations.num_rows


def _match(questions: ItemFile, annotations: ItemFile) -> pa.Array:
    """Per question the row of its annotation, null where it has none."""
    wanted = questions.columns["question_id"].to_numpy()
    given = annotations.columns["question_id"].to_numpy()
    order = np.argsort(given)
    if len(given) == 0:
        raise LeverError("the file holds no annotations", where=str(annotations.source.path))
    at = np.minimum(np.searchsorted(given[order], wanted), len(given) - 1)
    rows = order[at]
    found = given[rows] == wanted
    if int(found.sum()) != len(given):
        strangers = np.setdiff1d(given, wanted)
        raise LeverError(
            f"{len(strangers)} of {len(given)} annotations belong to no question of "
            f"{questions.source.path}",
            where=str(annotations.source.path),
            value=f"question_id {int(strangers[0])}",
            hint="questions and annotations must be of the same split",
        )
    return pa.array(rows, pa.int64(), mask=~found)


def _read(
    source: Source,
    wanted: tuple[str, type[msgspec.Struct]],
    kinds: dict[str, pa.DataType],
    row: Callable[[Any], tuple[Any, ...]],
    progress: Progress | None,
) -> ItemFile:
    result = ItemFile(source)
    chunks: dict[str, list[pa.Array]] = {name: [] for name in kinds}
    seen: set[int] = set()
    with source.reader(progress) as reader:
        scanner = Scanner(lambda: reader.read(1 << 18), str(source.path))
        for rows in _batches(scanner, wanted, result.head, str(source.path), seen):
            columns = zip(*map(row, rows), strict=True)
            for (name, kind), values in zip(kinds.items(), columns, strict=True):
                chunks[name].append(pa.array(values, kind))
            result.num_rows += len(rows)
    if not result.num_rows:
        raise LeverError(f"the file holds no {wanted[0]}", where=str(source.path))
    result.columns = {name: pa.chunked_array(chunks[name], kind) for name, kind in kinds.items()}
    return result


def _batches(
    scanner: Scanner,
    wanted: tuple[str, type[msgspec.Struct]],
    head: dict[str, Any],
    name: str,
    seen: set[int],
) -> Iterator[list[Any]]:
    """The items of the wanted list, some ten thousand at a time; other members go to ``head``."""
    decoder = msgspec.json.Decoder(wanted[1])
    scanner.skip_bom()
    going = scanner.enter(b"{", "an object: { … }")
    while going:
        _, raw = scanner.key()
        key, _ = json_exact.parse(raw, Place(name, scanner.offset))
        if key == wanted[0]:
            rows: list[Any] = []
            inside = scanner.enter(b"[", "a list: [ … ]")
            while inside:
                place = Place(name, *_item(scanner, decoder, rows, name))
                if rows[-1].question_id in seen:
                    what = "a question id occurs twice"
                    raise place.error(what, path=("question_id",), value=rows[-1].question_id)
                seen.add(rows[-1].question_id)
                inside = scanner.more(b"]")
                if len(rows) == _ROWS or not inside:
                    yield rows
                    rows = []
        else:
            offset, data = scanner.value()
            value, _ = json_exact.parse(data, Place(name, offset))
            if len(data) < 10_000:
                head[str(key)] = value
        going = scanner.more(b"}")
    scanner.finish()


def _item(
    scanner: Scanner, decoder: msgspec.json.Decoder[Any], rows: list[Any], name: str
) -> tuple[int]:
    """Read one item of the list into ``rows``; returns its offset."""
    offset, data = scanner.value()
    try:
        rows.append(decoder.decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        place = Place(name, offset)
        value, _ = json_exact.parse(data, place)
        rows.append(decode_typed(decoder, value, data, place))
    return (offset,)


def _image_folder(head: dict[str, Any]) -> str | None:
    """``train2014`` where the images are COCO's; ``test-dev2015`` shares the images of test2015."""
    match = _SUBTYPE.fullmatch(str(head.get("data_subtype")))
    if match is None or head.get("data_type", "mscoco") != "mscoco":
        return None
    return match.group(1) + match.group(2)


def _image_paths(image_ids: list[int | None], folder: str | None) -> pa.Array:
    """``train2014/COCO_train2014_000000000042.jpg``, as COCO names its files."""
    if folder is None:
        return pa.nulls(len(image_ids), pa.string())
    prefix = f"{folder}/COCO_{folder}_"
    return pa.array(
        [None if i is None else f"{prefix}{i:012d}.jpg" for i in image_ids], pa.string()
    )
