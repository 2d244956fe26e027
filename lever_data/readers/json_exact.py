"""Parse one JSON value exactly: duplicate keys, bad text and depth are errors with an offset.

In go the bytes of one value and where they lie in the file; out comes a Python object in which
``NaN``, ``Infinity`` and numbers beyond a double are ``None``, with a count per key. Slow (the
standard parser); used where the typed decoder refuses a value, to read it or to say why not.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from lever_data.errors import LeverError, shorten
from lever_data.readers.json_object import balance

Path = tuple[str | int, ...]


class NotJsonError(LeverError):
    """The text of a value is not JSON: its brackets, and so its end, cannot be trusted."""


_TOKEN = re.compile(
    rb'[ \t\n\r]*(?:("[^"\\]*+(?:\\.[^"\\]*+)*+")|([\[\]{}:,])|([^ \t\n\r\[\]{}:,"]+))', re.DOTALL
)
_NON_FINITE_TEXT = re.compile(rb"NaN|Infinity")
# The key before a non-finite number, and the end of the member behind it. In valid JSON both
# quotation marks are a string's ends: an escaped one has a backslash before it, and between two
# strings stands punctuation, never bare text.
_KEY_BEFORE = re.compile(rb'(?<!\\)"([^"\\]{0,64})"[ \t\n\r]*:[ \t\n\r]*\Z')
_END_BEHIND = re.compile(rb"[ \t\n\r]*[,}]")
_LONG_NUMBER = re.compile(r"-?[0-9]{4000,}")


@dataclass(frozen=True)
class Place:
    """Where a value lies: the file, the byte offset of the value in it, and the query id."""

    name: str
    offset: int
    query: str | None = None

    def error(self, what: str, at: int = 0, path: Path = (), value: object = None) -> LeverError:
        """An error ``at`` bytes into the value, in the field ``path``."""
        where = [self.name, f"byte {self.offset + at}"]
        if self.query is not None:
            where.append(f"query {shorten(self.query, 40)}")
        if path:
            where.append(f"field {format_path(path)}")
        return LeverError(what, where=", ".join(where), value=value)

    def field_error(self, what: str, data: bytes, path: Path) -> LeverError:
        """An error about the field ``path`` of the value ``data``: found, shown and located."""
        at, raw = locate(data, path)
        if raw[:1] in (b"[", b"{"):
            raw = raw[: balance(raw, 0, 0)[0]]
        return self.error(what, at, path, _show(raw))


def format_path(path: Path) -> str:
    """``("pointer_candidates", 3, "pointer")`` → ``pointer_candidates[3].pointer``."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".")


def parse(data: bytes, place: Place) -> tuple[object, Counter[str]]:
    """The value, and how many non-finite numbers became ``None``, by key.

    Raises:
        LeverError: the bytes are not valid JSON, or a key occurs twice in one object.
    """
    reader = _Reader()
    try:
        text = data.decode()
        value = reader.clean("", reader.decoder.decode(text))
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 8]
        raise place.error("the text is not valid UTF-8", error.start, value=bad) from None
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        near = data[at : at + 40]
        broken = place.error(f"not valid JSON: {error.msg}", at, value=near)
        raise NotJsonError(broken.what, where=broken.where, value=near) from None
    except _DuplicateKeyError:
        path, at = _find_duplicate(data)
        raise place.error("a key occurs twice in one object", at, path) from None
    except RecursionError:
        raise place.error("the value is nested too deeply", value=data[:40]) from None
    except ValueError:  # int() refuses numbers of thousands of digits
        match = _LONG_NUMBER.search(text)
        at = len(text[: match.start()].encode()) if match else 0
        raise place.error("a number is too long", at, value=data[at : at + 20]) from None
    return value, reader.non_finite


def null_non_finite(text: bytes) -> tuple[bytes, Counter[str]]:
    """``text`` with NaN and Infinity as members of objects replaced by null, and counts by key.

    Text that is not valid JSON otherwise stays invalid; numbers in lists are left as they are.
    """
    counts: Counter[str] = Counter()
    parts: list[bytes] = []
    done = 0
    for match in _NON_FINITE_TEXT.finditer(text):
        start = match.start()
        if text[start : start + 1] == b"I" and text[start - 1 : start] == b"-":
            start -= 1
        key = _KEY_BEFORE.search(text[max(0, start - 128) : start])
        if key is not None and _END_BEHIND.match(text, match.end()):
            counts[key.group(1).decode(errors="replace")] += 1
            parts += (text[done:start], b"null")
            done = match.end()
    parts.append(text[done:])
    return b"".join(parts), counts


def encode(value: object, data: bytes, place: Place) -> bytes:
    """The parsed value as clean JSON text; ``data`` is what it was parsed from."""
    try:
        return json.dumps(value, ensure_ascii=False, check_circular=False).encode()
    except UnicodeEncodeError:
        at, raw = _find_surrogate(data)
        raise place.error("half of a surrogate pair is not a character", at, value=raw) from None
    except RecursionError:
        raise place.error("the value is nested too deeply", value=data[:40]) from None


def locate(data: bytes, path: Path) -> tuple[int, bytes]:
    """Offset and bytes of the field at ``path``; of the deepest part of it that exists."""
    best = (0, b"")
    depth = -1
    for found, start, end in walk(data):
        if found == path[: len(found)] and len(found) > depth:
            best, depth = (start, data[start:end]), len(found)
        if found == path:
            break
    return best


def walk(data: bytes) -> Iterator[tuple[Path, int, int]]:
    """Every value of valid JSON text: path, offset, and an end that is exact for scalars only.

    The end of a container is the end of ``data``: it has not been reached yet.
    """
    path: list[str | int] = []
    opened: list[int] = []
    pending: str | None = None
    for match in _TOKEN.finditer(data):
        token, start, end = match.group().lstrip(), match.start(match.lastindex or 0), match.end()
        if token in (b"{", b"["):
            yield tuple(path), start, len(data)
            opened.append(token[0])
            path.append(0 if token == b"[" else "")
            pending = None
        elif token in (b"}", b"]"):
            opened.pop()
            path.pop()
        elif token == b",":
            last = path[-1]
            path[-1] = last + 1 if isinstance(last, int) else ""
        elif token == b":":
            path[-1] = pending or ""
        elif opened and opened[-1] == 0x7B and path[-1] == "" and _before_colon(data, end):
            pending = json.loads(token)
        else:
            yield tuple(path), start, end


def _before_colon(data: bytes, at: int) -> bool:
    return data[at : at + 64].lstrip()[:1] == b":" or data[at:].lstrip()[:1] == b":"


class _DuplicateKeyError(Exception):
    pass


_NON_FINITE = object()


class _Reader:
    """A standard decoder with hooks; counts what it nulls."""

    def __init__(self) -> None:
        self.non_finite: Counter[str] = Counter()
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_float=_finite,
            parse_constant=lambda _: _NON_FINITE,
        )

    def clean(self, key: str, value: object) -> object:
        """``value`` with non-finite numbers replaced, inside lists as well."""
        if value is _NON_FINITE:
            self.non_finite[key] += 1
            return None
        if isinstance(value, list):
            return [self.clean(key, item) for item in value]
        return value

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = {key: self.clean(key, value) for key, value in pairs}
        if len(result) != len(pairs):
            raise _DuplicateKeyError
        return result


def _finite(text: str) -> object:
    number = float(text)
    return number if math.isfinite(number) else _NON_FINITE


def _find_duplicate(data: bytes) -> tuple[Path, int]:
    seen: set[Path] = set()
    for path, start, _ in walk(data):
        if path in seen:
            return path, start
        seen.add(path)
    return (), 0


def _find_surrogate(data: bytes) -> tuple[int, bytes]:
    for match in _TOKEN.finditer(data):
        if match.group(1):
            try:
                json.loads(match.group(1)).encode()
            except UnicodeEncodeError:
                return match.start(1), match.group(1)[:60]
    return 0, b""


def _show(raw: bytes) -> object:
    """A short value for a message: text for JSON text, cut where it is long."""
    return raw[:200].decode(errors="replace") or None
