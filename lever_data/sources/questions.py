"""Questions and annotations, in the layouts their publishers use, become columns.

In go files, read item by item: VQA and OK-VQA (two files: questions, annotations), and TextVQA,
VizWiz, VQA-X, A-OKVQA, GQA (one file with both); out comes an
:class:`~lever_data.sources.item_file.ItemFile`, one row per question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pyarrow as pa

from lever_data.errors import LeverError
from lever_data.items.items import majority, official_id
from lever_data.items.prompts import Id
from lever_data.readers import json_exact
from lever_data.readers.json_exact import Place
from lever_data.readers.json_object import Scanner
from lever_data.readers.source import Progress, Source
from lever_data.sources.fields import Int64, decode_typed
from lever_data.sources.item_file import ItemFile
from lever_data.store import schema

_ROWS = 50_000
_COCO = re.compile(r"COCO_((?:train|val|test)\d{4})_\d+\.jpg")
_IMAGE_ENDING = re.compile(r".*\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)


class _Answer(msgspec.Struct, gc=False):
    answer: str


class _Item(msgspec.Struct, gc=False):
    """What an item may hold, in any of the layouts; GQA writes ``imageId``."""

    question_id: Int64 | str | None = None
    question: str | None = None
    image_id: Int64 | str | None = None
    imageId: Int64 | str | None = None  # noqa: N815 - the name in the file
    image_path: str | None = None
    image: str | None = None
    file_name: str | None = None
    image_name: str | None = None
    answers: list[str | _Answer] | None = None
    direct_answers: list[str] | None = None
    answer: str | None = None
    multiple_choice_answer: str | None = None
    split: str | None = None


def read_questions(
    source: Source, progress: Progress | None = None, *, salvage: bool = False
) -> ItemFile:
    """Questions → ids, and columns question, image_path, answers, answer.

    ``answers`` and ``answer`` are null where the file has none (the two-file layouts).

    Raises:
        LeverError: not valid, of other types, or a question id occurs twice; with ``salvage`` a
            bad item is left out and noted.
    """
    return _read(source, "questions", _question_row, progress, salvage)


def read_annotations(
    source: Source, progress: Progress | None = None, *, salvage: bool = False
) -> ItemFile:
    """Annotations → ids, and columns answers, answer.

    ``answer`` is ``multiple_choice_answer`` where the file has it, else the most frequent answer,
    the first of those that are equally frequent.
    """
    return _read(source, "annotations", _annotation_row, progress, salvage)


@dataclass(slots=True)
class _Row:
    """What one item says."""

    question_id: Id
    question: str | None = None
    image_id: Id | None = None
    image_path: str | None = None
    answers: list[str] | None = None
    answer: str | None = None


def _read(
    source: Source,
    what: str,
    row: Callable[[_Item, str | None, Place], _Row],
    progress: Progress | None,
    salvage: bool,
) -> ItemFile:
    """Every item of a file as a row; which layout it is, its text tells."""
    result = ItemFile(source)
    decoder = msgspec.json.Decoder(_Item)
    name, seen = str(source.path), set[Id]()
    chunks: list[pa.Table] = []
    rows: list[_Row] = []
    with source.reader(progress) as reader:
        scanner = Scanner(lambda: reader.read(1 << 18), name)
        for number, (key, offset, data) in enumerate(_entries(scanner, what, result.head, name)):
            place = Place(name, offset)
            try:
                made = row(_decode(decoder, data, place), key, place)
                if made.question_id in seen:
                    problem = "a question id occurs twice"
                    raise place.error(problem, path=("question_id",), value=made.question_id)
            except LeverError as error:
                if not salvage:
                    raise
                result.skipped.append((_readable_id(key, data), error.message()))
                continue
            seen.add(made.question_id)
            rows.append(made)
            result.numbers.append(number)
            if len(rows) == _ROWS:
                chunks.append(_flushed(result, rows))
                rows = []
    chunks.append(_flushed(result, rows))
    if not result.num_rows:
        first = f"; first fault: {result.skipped[0][1]}" if result.skipped else ""
        raise LeverError(f"the file holds no {what}{first}", where=name)
    table = pa.concat_tables(chunks)
    result.columns = {column: table[column] for column in table.column_names}
    return result


def _flushed(result: ItemFile, rows: list[_Row]) -> pa.Table:
    """Rows as Arrow columns, a quarter of their memory; the ids stay apart."""
    result.question_ids += [row.question_id for row in rows]
    result.image_ids += [row.image_id for row in rows]
    fields = [schema.EXAMPLES.field(n) for n in ("question", "image_path", "answers", "answer")]
    return pa.table(
        {f.name: pa.array([getattr(row, f.name) for row in rows], f.type) for f in fields}
    )


def _entries(
    scanner: Scanner, what: str, head: dict[str, Any], name: str
) -> Iterator[tuple[str | None, int, bytes]]:
    """(key, offset, bytes) of every item: of a list, of a member that is one, of an object whose
    keys are question ids, or of JSON lines. Other members go to ``head``."""
    scanner.skip_bom()
    if scanner.peek() == b"[":
        yield from _list(scanner)
        scanner.finish()
        return
    going = scanner.enter(b"{", "an object: { … }")
    while going:
        _, raw = scanner.key()
        key = str(json_exact.parse(raw, Place(name, scanner.offset))[0])
        if key in (what, "data") and scanner.peek() == b"[":
            yield from _list(scanner)
        else:
            offset, data = scanner.value()
            if data[:1] == b"{" and b'"question"' in data:
                yield key, offset, data
            elif len(data) < 10_000:
                head[key] = json_exact.parse(data, Place(name, offset))[0]
        going = scanner.more(b"}")
    scanner.finish()


def _list(scanner: Scanner) -> Iterator[tuple[None, int, bytes]]:
    inside = scanner.enter(b"[", "a list: [ … ]")
    while inside:
        yield (None, *scanner.value())
        inside = scanner.more(b"]")


def _decode(decoder: msgspec.json.Decoder[_Item], data: bytes, place: Place) -> _Item:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value, _ = json_exact.parse(data, place)
        item: _Item = decode_typed(decoder, value, data, place)
        return item


def _readable_id(key: str | None, data: bytes) -> Id | None:
    """The question id of a broken item."""
    found = re.search(rb'"question_id"\s*:\s*(?:(\d+)|"([^"\\]+)")', data)
    if found is not None:
        return official_id((found[1] or found[2]).decode(errors="replace"))
    return None if key is None else official_id(key)


def _question_row(item: _Item, key: str | None, place: Place) -> _Row:
    if item.question is None:
        raise place.error("Object missing required field `question`")
    path = _image_path(item)
    # VizWiz has one question an image, and no ids but the images'
    question_id = _first(item.question_id, key, path)
    if question_id is None:
        raise place.error("Object missing required field `question_id`")
    return _Row(
        question_id,
        item.question,
        _first(item.image_id, item.imageId),
        path,
        answers := _answers(item),
        _first_text(item.multiple_choice_answer, item.answer, majority(answers or ())),
    )


def _annotation_row(item: _Item, key: str | None, place: Place) -> _Row:
    answers = _answers(item)
    if answers is None:
        raise place.error("Object missing required field `answers`")
    question_id = _first(item.question_id, key)
    if question_id is None:
        raise place.error("Object missing required field `question_id`")
    chosen = _first_text(item.multiple_choice_answer, majority(answers))
    return _Row(question_id, answers=answers, answer=chosen)


def _first(*ids: Id | None) -> Id | None:
    """The first id that is there; 0 is one."""
    found = next((i for i in ids if i is not None), None)
    return None if found is None else official_id(found)


def _first_text(*texts: str | None) -> str | None:
    return next((text for text in texts if text is not None), None)


def _answers(item: _Item) -> list[str] | None:
    """The annotators' answers; GQA's one answer is one annotator's."""
    if item.answers is not None:
        return [a if isinstance(a, str) else a.answer for a in item.answers]
    if item.direct_answers is not None:
        return item.direct_answers
    return None if item.answer is None else [item.answer]


def _image_path(item: _Item) -> str | None:
    """The image file an item names, or that its layout gives its image; ``None`` where neither."""
    named = _first_text(item.image_path, item.image, item.file_name, item.image_name)
    if named is not None:
        coco = _COCO.fullmatch(named)
        return f"{coco.group(1)}/{named}" if coco else named
    image_id = item.imageId if item.image_id is None else item.image_id
    if isinstance(image_id, str):  # TextVQA and GQA leave out the ending, VizWiz does not
        return image_id if _IMAGE_ENDING.fullmatch(image_id) else f"{image_id}.jpg"
    if image_id is not None and item.direct_answers is not None and item.split:  # A-OKVQA
        return f"{item.split}2017/{image_id:012d}.jpg"
    return None
