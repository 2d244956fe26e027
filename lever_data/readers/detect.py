"""Tell what a source file holds, by its content: RL data, beams, items, results, texts, vectors.

In goes a :class:`~lever_data.readers.source.Source`, out comes a :class:`SourceFile`. The name of a
file plays no part.
"""

from __future__ import annotations

import zipfile
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from lever_data.errors import LeverError
from lever_data.readers import json_exact
from lever_data.readers.json_object import Scanner
from lever_data.readers.source import Source

# items: questions with their answers in one file (TextVQA, VizWiz, VQA-X, A-OKVQA, GQA)
Kind = Literal[
    "rl_data",
    "beam",
    "questions",
    "annotations",
    "items",
    "results",
    "texts",
    "npy",
    "safetensors",
    "torch",
]

_PEEK = 1 << 14  # bytes; a broken file is broken further on, where its reader says how
_HINT = (
    "lever reads RL data and beam data (one JSON object, key = query id), official questions and "
    "annotations, results files, a list of texts (one an item), and embeddings (.pt, .npy, "
    ".safetensors)"
)


@dataclass(frozen=True)
class SourceFile:
    """A source and what it holds.

    Attributes:
        subtype: ``data_subtype`` of a question or annotation file (``train2014``), where it
            stands before the long list.
    """

    source: Source
    kind: Kind
    subtype: str | None = None


@dataclass
class _Head:
    kind: Kind | None = None
    members: dict[str, Any] = field(default_factory=dict)


def detect(source: Source) -> SourceFile:
    """What the file holds.

    Raises:
        LeverError: nothing that lever reads.
    """
    with source.reader() as reader:
        start = b""
        while len(start) < _PEEK and (part := reader.read(_PEEK - len(start))):
            start += part
        kind = _binary_kind(start, source)
        if kind is not None:
            return SourceFile(source, kind)
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
        if not text.startswith((b"{", b"[")):
            raise _unknown(source, "the file is not a kind lever knows", start)
        pending = [start]
        scanner = Scanner(
            lambda: pending.pop() if pending else reader.read(_PEEK), str(source.path)
        )
        scanner.skip_bom()
        head = _list_kind(scanner) if text[:1] == b"[" else _json_kind(scanner, source)
    if head.kind is None:
        what = "a JSON object, but of no kind lever knows"
        if text[:1] == b"[":
            what = "the file is not a kind lever knows"
        raise _unknown(source, what, start)
    subtype = head.members.get("data_subtype")
    return SourceFile(source, head.kind, subtype if isinstance(subtype, str) else None)


def _binary_kind(start: bytes, source: Source) -> Kind | None:
    if start.startswith(b"PK\x03\x04"):
        return "results" if zipped_json(source) is not None else "torch"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 30:
        return "safetensors"
    return None


def _json_kind(scanner: Scanner, source: Source) -> _Head:
    """Walk the top level until a member tells the kind."""
    head = _Head()
    if not scanner.enter(b"{", "an object"):
        raise _unknown(source, "the JSON object is empty: it holds no queries", None)
    while head.kind is None:
        _, raw_key = scanner.key()
        key = raw_key.strip(b'"').decode(errors="replace")
        if key in _LISTS and scanner.peek() == b"[":
            head.kind = _LISTS[key]
        elif key.isdigit():
            head.kind = _keyed_kind(scanner)
        else:
            at, value = scanner.value()
            if key.startswith("_") and not scanner.more(b"}"):
                raise _unknown(source, "the file holds no queries", None)
            if key.startswith("_"):
                continue
            if key in _RESULT_IDS or key in _RESULT_ANSWERS:
                head.members[key] = value.decode(errors="replace")
            elif value[:1] == b'"':
                place = json_exact.Place(str(source.path), at)
                head.members[key] = str(json_exact.parse(value, place)[0])
            if not scanner.more(b"}"):
                break
    if head.kind is None and _is_result(head.members):  # the first of JSON lines
        head.kind = "results"
    return head


_LISTS: dict[str, Kind] = {
    "questions": "questions",
    "annotations": "annotations",
    "data": "items",
}
_RESULT_IDS = ("question_id", "questionId", "image")
_RESULT_ANSWERS = ("answer", "prediction")


def _is_result(members: Container[str]) -> bool:
    """Whether an object with these members is a line of a results file."""
    return any(i in members for i in _RESULT_IDS) and any(a in members for a in _RESULT_ANSWERS)


def _list_kind(scanner: Scanner) -> _Head:
    """What the first of a list is: an item, a result, or a text."""
    head = _Head()
    with suppress(LeverError):
        opened = scanner.enter(b"[", "a list")
        if opened and scanner.peek() == b'"':
            head.kind = "texts"
        elif opened and scanner.peek() == b"{":
            _, text = scanner.value()
            first = json_exact.parse(text, json_exact.Place("", 0))[0]
            assert isinstance(first, dict)
            if "question" in first:
                head.kind = "items"
            elif _is_result(first):
                head.kind = "results"
    return head


def zipped_json(source: Source) -> str | None:
    """The name of the one JSON file in a zip archive, as evaluation servers take results."""
    try:
        with zipfile.ZipFile(source.path) as archive:
            names = [n for n in archive.namelist() if n.endswith((".json", ".jsonl"))]
            return names[0] if len(names) == 1 else None
    except (zipfile.BadZipFile, OSError, ValueError):
        return None  # the reader of torch files says what is wrong


def _keyed_kind(scanner: Scanner) -> Kind:
    """What the value under a number holds: beams, a question, or else RL data."""
    try:
        going = scanner.peek() == b"{" and scanner.enter(b"{", "an object")
        while going:
            _, key = scanner.key()
            if key in (b'"id_list"', b'"score_list"'):
                return "beam"
            if key == b'"question"':
                return "items"
            if key == b'"pointer_candidates"':
                break
            scanner.value()
            going = scanner.more(b"}")
    except LeverError:
        pass  # the reader of RL data says what is wrong there
    return "rl_data"


def _unknown(source: Source, what: str, start: bytes | None) -> LeverError:
    return LeverError(what, where=str(source.path), value=start[:40] if start else None, hint=_HINT)
