"""Tell what a source file holds, by its content: RL data, beams, questions, annotations, vectors.

In goes a :class:`~lever_data.readers.source.Source`, out comes a :class:`Found`. The name of a
file plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lever_data.errors import LeverError
from lever_data.readers import json_exact
from lever_data.readers.json_object import Scanner
from lever_data.readers.source import Source

Kind = Literal["rl_data", "beam", "questions", "annotations", "npy", "safetensors", "torch"]

_PEEK = 1 << 14  # bytes; a broken file is broken further on, where its reader says how
_HINT = (
    "lever reads RL data and beam data (one JSON object, key = query id), official VQA questions "
    "and annotations, and embeddings (.pt, .npy, .safetensors)"
)


@dataclass(frozen=True)
class Found:
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


def detect(source: Source) -> Found:
    """What the file holds.

    Raises:
        LeverError: nothing that lever reads.
    """
    with source.reader() as reader:
        start = b""
        while len(start) < _PEEK and (part := reader.read(_PEEK - len(start))):
            start += part
        kind = _binary_kind(start)
        if kind is not None:
            return Found(source, kind)
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
        if not text.startswith(b"{"):
            raise _unknown(source, "the file is not a kind lever knows", start)
        pending = [start]
        scanner = Scanner(
            lambda: pending.pop() if pending else reader.read(_PEEK), str(source.path)
        )
        head = _json_kind(scanner, source)
    if head.kind is None:
        raise _unknown(source, "a JSON object, but of no kind lever knows", start)
    subtype = head.members.get("data_subtype")
    return Found(source, head.kind, subtype if isinstance(subtype, str) else None)


def _binary_kind(start: bytes) -> Kind | None:
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 30:
        return "safetensors"
    return None


def _json_kind(scanner: Scanner, source: Source) -> _Head:
    """Walk the top level until a member tells the kind."""
    head = _Head()
    scanner.skip_bom()
    if not scanner.enter(b"{", "an object"):
        raise _unknown(source, "the JSON object is empty: it holds no queries", None)
    while head.kind is None:
        _, raw_key = scanner.key()
        key = raw_key.strip(b'"').decode(errors="replace")
        if key in ("questions", "annotations") and scanner.peek() == b"[":
            head.kind = "questions" if key == "questions" else "annotations"
        elif key.isdigit():
            head.kind = "beam" if _is_beam(scanner) else "rl_data"
        else:
            at, value = scanner.value()
            if key.startswith("_") and not scanner.more(b"}"):
                raise _unknown(source, "the file holds no queries", None)
            if key.startswith("_"):
                continue
            if value[:1] == b'"':
                place = json_exact.Place(str(source.path), at)
                head.members[key] = str(json_exact.parse(value, place)[0])
            if not scanner.more(b"}"):
                break
    return head


def _is_beam(scanner: Scanner) -> bool:
    """Whether the query's value that comes next holds beams; RL data in any doubt."""
    try:
        going = scanner.peek() == b"{" and scanner.enter(b"{", "an object")
        while going:
            _, key = scanner.key()
            if key in (b'"id_list"', b'"score_list"', b'"pointer_candidates"'):
                return key != b'"pointer_candidates"'
            scanner.value()
            going = scanner.more(b"}")
    except LeverError:
        return False  # the reader of RL data says what is wrong there
    return False


def _unknown(source: Source, what: str, start: bytes | None) -> LeverError:
    return LeverError(what, where=str(source.path), value=start[:40] if start else None, hint=_HINT)
