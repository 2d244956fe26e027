"""A data set of any columns into the examples table.

In go rows (:mod:`lever_data.readers.rows`) and which columns mean what, given or guessed by their
names; out comes an :class:`~lever_data.sources.item_file.ItemFile` as of the official files.
Pictures that are inside the file go into the store's folder ``images``, named by their content.
Memory holds ids and a few rows: what is read waits in a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import majority, official_id
from lever_data.items.prompts import Id
from lever_data.items.task import Task
from lever_data.readers.rows import Row, is_csv, label_names, rows_of
from lever_data.readers.source import Source
from lever_data.sources.ingest_options import Columns
from lever_data.sources.item_file import ItemFile
from lever_data.store import schema
from lever_data.store.mirror_room import IMAGES
from lever_data.store.pictures import put_pictures

_UNLABELLED = -1  # what `datasets` stores where a split's labels are kept secret
_WAITING = 4096  # rows of a batch of what was read
_READ = pa.schema(
    [schema.EXAMPLES.field(n) for n in ("question", "image_path", "answers", "answer")]
    + [schema.EXTRA]
)
_WHOLE = re.compile(r"-?\d+\.0")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# what a column is called that means this, the surest name first
_NAMES = {
    "input": ("question", "input", "text", "sentence", "prompt", "query"),
    "answers": (
        *("answers", "answer", "label", "labels", "references", "captions", "caption", "target"),
        *("output", "completion", "answerKey"),
    ),
    "image": ("image", "image_path", "file_name", "img"),
    "context": ("context", "passage", "paragraph"),
    "choices": ("choices", "options"),
    "id": ("id", "question_id", "qid", "uid", "idx"),
}


@dataclass(frozen=True)
class Meaning:
    """Which column means what; ``further``: fields a template may show, and their columns.
    ``labels``: names of labels that are stored as numbers. ``whole``: the answers are integers that
    pandas wrote as 1.0 and 2.0, since a missing one has made floats of all."""

    answers: str
    input: str | None
    image: str | None
    choices: str | None
    id: str | None
    further: Mapping[str, str]
    labels: Sequence[str] = ()
    whole: bool = False

    def shown(self) -> dict[str, Any]:
        """What stands for what, for people and for the run's parameters."""
        named = {n: getattr(self, n) for n in ("input", "answers", "image", "choices", "id")}
        return {n: c for n, c in {**named, **self.further}.items() if c is not None}


def meaning_of(files: Sequence[Path], given: Columns) -> Meaning:
    """What the columns mean: as given, else by their names.

    Raises:
        UsageError: a column that is named is not there, or none holds answers or the input.
    """
    first = next((row for file in files for row in rows_of(file)), None)
    if first is None:
        raise LeverError("the file holds no rows", where=str(files[0]))
    further = dict(_pair(text) for text in given.field)
    if given.context is not None:
        further["context"] = given.context
    named = {n: getattr(given, n) for n in _NAMES}
    for column in (*filter(None, named.values()), *further.values()):
        if column not in first:
            raise UsageError(
                "there is no such column",
                where=str(files[0]),
                value=column,
                hint=f"it has {', '.join(map(str, first))}",
            )
    taken = {*filter(None, named.values()), *further.values()}
    for name, guesses in _NAMES.items():
        if named[name] is None:
            free = (g for g in guesses if g in first and g not in taken)
            named[name] = next(free, None)
            taken |= {named[name]}
    if named["context"] is not None:
        further.setdefault("context", named["context"])
    if named["answers"] is None or (named["input"] is None and named["image"] is None):
        raise UsageError(
            "no column is called as if it held the answers, or the input",
            where=str(files[0]),
            value=", ".join(map(str, first)),
            hint="--input COLUMN (or --image COLUMN) and --answers COLUMN",
        )
    labels = label_names(files[0]).get(named["answers"], ())
    kept = {n: named[n] for n in ("answers", "input", "image", "choices", "id")}
    whole = _are_whole(files, str(kept["answers"]))
    return Meaning(**kept, further=further, labels=labels, whole=whole)


def guessed_task(meaning: Meaning, given: Task | None) -> Task:
    """The task of such columns: that given, else choice, caption, vqa or qa; with the fields that
    its templates do not show yet."""
    if given is not None:
        task = given
    elif meaning.choices is not None or meaning.labels:
        task = Task(name="choice")
    elif meaning.image is not None:
        task = Task(name="caption") if meaning.input is None else Task()
    else:
        task = Task(name="qa")
    if given is None:
        if meaning.choices is not None:
            task = task.with_field("choices")
        for name in meaning.further:
            task = task.with_field(name)
    return task


def read_dataset(files: Sequence[Path], meaning: Meaning, folder: Path) -> ItemFile:
    """The items of data files, with the column ``extra`` where they have further fields.

    Args:
        folder: a new one for the columns, which are mapped into memory.

    Raises:
        LeverError: a value is not what its column means, or an id occurs twice; it names the row.
    """
    result, file = ItemFile(Source.open(files[0])), folder / "rows.arrow"
    seen: set[Id] = set()
    folder.mkdir()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _READ) as out:
        waiting: list[tuple[Any, ...]] = []
        for number, row, where in _numbered(files):
            key = official_id(number if meaning.id is None else _id(row, meaning.id, where))
            if key in seen:
                raise LeverError("an id occurs twice", where=where, value=key)
            seen.add(key)
            waiting.append(_columns(row, meaning, where))
            result.question_ids.append(key)
            result.image_ids.append(waiting[-1][1])
            result.numbers.append(number)
            if len(waiting) == _WAITING:
                out.write_batch(_batch(waiting))
                waiting = []
        out.write_batch(_batch(waiting))
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    if table["extra"].null_count == table.num_rows:
        table = table.drop_columns("extra")
    result.columns = {name: table[name] for name in table.column_names}
    return result


def keep_pictures(files: Sequence[Path], meaning: Meaning, store: Path) -> None:
    """Put the pictures that are inside the files into the store."""
    if meaning.image is not None:
        put_pictures(store, _pictures(files, meaning.image))


def _pictures(files: Sequence[Path], column: str) -> Iterator[tuple[str, bytes]]:
    for file in files:
        for number, row in enumerate(rows_of(file, column)):
            name, data = _image(row, column, f"{file}: row {number}")
            if data is not None and name is not None:
                yield name, data


def _numbered(files: Sequence[Path]) -> Iterator[tuple[int, Row, str]]:
    """Every row with its number among all, and where it stands."""
    total = 0
    for file in files:
        for number, row in enumerate(rows_of(file)):
            yield total, row, f"{file}: row {number}"
            total += 1


def _columns(row: Row, meaning: Meaning, where: str) -> tuple[Any, ...]:
    """What a row says, as ``_READ`` has it."""
    fields = {name: _text(row, column, where) for name, column in meaning.further.items()}
    answers, answer = _answers(row, meaning, fields, where)
    asked = "" if meaning.input is None else _text(row, meaning.input, where)
    extra = json.dumps(fields, ensure_ascii=False, sort_keys=True) if fields else None
    return asked, _image(row, meaning.image, where)[0], answers, answer, extra


def _batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [()] * len(_READ)
    return pa.RecordBatch.from_arrays([*map(pa.array, columns, _READ.types)], schema=_READ)


def _are_whole(files: Sequence[Path], column: str) -> bool:
    """Whether all values are integers written as floats."""
    found = False
    for file in files:
        for row in rows_of(file, column):
            said = row.get(column)
            if not _is_none(said):
                if not _is_whole(said, is_text=is_csv(file)):
                    return False
                found = True
    return found


def _is_whole(said: Any, *, is_text: bool) -> bool:
    if is_text:
        return _WHOLE.fullmatch(str(said)) is not None
    return isinstance(said, float) and said.is_integer()


def _is_none(said: Any) -> bool:
    """NaN is how pandas says none."""
    return said is None or said in ("", []) or said != said


def _pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (equals and name.isidentifier() and column):
        raise UsageError("--field is NAME=COLUMN", value=text)
    return name, column


def _value(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise LeverError("a row lacks a column", where=where, value=column)
    return row[column]


def _id(row: Row, column: str, where: str) -> Id:
    value = _value(row, column, where)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise LeverError(f"an id in the column {column} is not an integer or text", where=where)
    return value


def _text(row: Row, column: str, where: str) -> str:
    value = _value(row, column, where)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    if not isinstance(value, str | int | float):
        raise LeverError(f"a value in the column {column} is not text", where=where, value=value)
    return str(value)


def _answers(
    row: Row, meaning: Meaning, fields: dict[str, str], where: str
) -> tuple[list[str] | None, str | None]:
    """All accepted answers and the one a demonstration shows: of choices the letter, with the
    choices as a field of the item."""
    said = _value(row, meaning.answers, where)
    if _is_none(said):
        return None, None
    if meaning.whole:
        said = int(float(said))
    if meaning.choices is not None:
        return _choice(said, _value(row, meaning.choices, where), fields, where)
    if isinstance(said, dict) and "text" in said:  # SQuAD: {"text": […], "answer_start": […]}
        said = said["text"]
    several = said if isinstance(said, list) else [said]
    if meaning.labels and several == [_UNLABELLED]:
        return None, None
    found = [_answer(one, meaning, where) for one in several]
    return found or None, majority(found)


def _answer(said: Any, meaning: Meaning, where: str) -> str:
    if isinstance(said, dict):
        said = said.get("answer", said.get("text"))
    if meaning.labels and isinstance(said, int) and not isinstance(said, bool):
        if not 0 <= said < len(meaning.labels):
            raise LeverError(
                f"a label in the column {meaning.answers} has no name", where=where, value=said
            )
        return str(meaning.labels[said])
    if not isinstance(said, str | int | float):
        raise LeverError(
            f"an answer in the column {meaning.answers} is not text", where=where, value=said
        )
    return str(said)


def _choice(said: Any, choices: Any, fields: dict[str, str], where: str) -> tuple[list[str], str]:
    letters: Sequence[str] = _LETTERS
    if isinstance(choices, dict):  # ARC: {"text": […], "label": […]}
        letters, choices = [str(one) for one in choices.get("label", _LETTERS)], choices.get("text")
    if not (isinstance(choices, list) and 0 < len(choices) <= len(letters)):
        raise LeverError("the choices are not a list", where=where, value=choices)
    texts = [str(one) for one in choices]
    fields["choices"] = "\n".join(f"{a}. {t}" for a, t in zip(letters, texts, strict=False))
    if isinstance(said, int) and 0 <= said < len(texts):
        at = said
    elif said in letters[: len(texts)]:
        at = letters.index(said)
    elif said in texts:
        at = texts.index(said)
    else:
        raise LeverError("the answer is none of the choices", where=where, value=said)
    return [letters[at], texts[at]], letters[at]


def _image(row: Row, column: str | None, where: str) -> tuple[str | None, bytes | None]:
    """The image's file: as named, or below the store's folder, and then the bytes that go there."""
    said = None if column is None else _value(row, column, where)
    if isinstance(said, dict):  # an image of `datasets`
        said = said.get("path") if said.get("bytes") is None else said["bytes"]
    if said is None or isinstance(said, str):
        return said, None
    if not isinstance(said, bytes):
        raise LeverError(f"an image in the column {column} is not a file", where=where)
    return f"{IMAGES}/{hashlib.sha256(said).hexdigest()}", said
