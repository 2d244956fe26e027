"""Stream one giant JSON object or array: bounded memory, exact byte offsets, no trust in layout.

In goes a feed of bytes; out come top-level members as (key, value bytes, byte offset), one at a
time. Faster, but to be proven by the caller: whole blocks of members, see ``sources/decode.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lever_data.errors import LeverError

VALUE_LIMIT = 64 << 20
BOM = b"\xef\xbb\xbf"

_SPACE = re.compile(rb"[ \t\n\r]*")
_SCALAR = re.compile(rb"[^ \t\n\r,\]}]*")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# Group 1 is empty where the string goes on beyond the buffer.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[\]{}]', re.DOTALL)
_QUERY_KEY = re.compile(rb'"[0-9]{1,19}"[ \t\n\r]*:[ \t\n\r]*\{')


@dataclass(frozen=True)
class Member:
    """One member of an object: its key as written (quotes included) and its value's bytes."""

    key: bytes
    key_offset: int
    value: bytes
    value_offset: int


class Scanner:
    """Walks JSON text from a feed of bytes without trusting its layout.

    It checks the structure it steps over (quotes, colons, commas, the balance of brackets), not
    the inside of values; those are parsed by whoever asked for them.

    Args:
        feed: gives the next bytes, ``b""`` at the end of the text.
        name: the file, for messages.
        offset: byte offset of the first byte of the feed.
    """

    def __init__(self, feed: Callable[[], bytes], name: str, offset: int = 0) -> None:
        self._feed = feed
        self._name = name
        self._buffer = bytearray()
        self._base = offset
        self._at = 0
        self._ended = False

    @property
    def offset(self) -> int:
        """Byte offset of the next byte to be looked at."""
        return self._base + self._at

    def is_drained(self) -> bool:
        """Whether nothing but white space is left of the bytes fed so far."""
        match = _SPACE.match(self._buffer, self._at)
        return match is not None and match.end() == len(self._buffer)

    def skip_bom(self) -> None:
        """Step over a byte order mark."""
        while len(self._buffer) < len(BOM) and self._fill():
            pass
        if self._buffer.startswith(BOM):
            self._at = len(BOM)

    def peek(self) -> bytes:
        """The next byte that is not white space; ``b""`` at the end of the text."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer):
                return bytes(self._buffer[self._at : self._at + 1])
            if not self._fill():
                return b""

    def take(self, wanted: bytes, what: str) -> None:
        """Step over one byte, which must be ``wanted``."""
        found = self.peek()
        if found != wanted:
            raise self.error(f"expected {what}", found)
        self._at += 1

    def enter(self, bracket: bytes, what: str) -> bool:
        """Step into a container; returns whether it has anything in it."""
        self.take(bracket, what)
        if self.peek() != (b"}" if bracket == b"{" else b"]"):
            return True
        self._at += 1
        return False

    def more(self, bracket: bytes) -> bool:
        """Step over the comma (True) or the closing bracket (False) behind a value."""
        found = self.peek()
        if found not in (b",", bracket):
            raise self.error(f"expected , or {bracket.decode()} behind a value", found)
        self._at += 1
        return found == b","

    def finish(self) -> None:
        """Check that nothing but white space is left."""
        found = self.peek()
        if found:
            raise self.error("something follows the end of the JSON value", found)

    def key(self) -> tuple[int, bytes]:
        """Step over a key and its colon; returns the key's offset and text, quotes included."""
        if self.peek() != b'"':
            raise self.error('expected a key in "quotes"', self.peek())
        start, text = self.value()
        self.take(b":", "a colon behind the key")
        return start, text

    def member(self) -> Member:
        """Step over one member of an object."""
        key_offset, key = self.key()
        value_offset, value = self.value()
        return Member(key, key_offset, value, value_offset)

    def value(self) -> tuple[int, bytes]:
        """Step over one value of at most 64 MB; returns its offset and its bytes."""
        first = self.peek()
        start = self.offset
        del self._buffer[: self._at]
        self._base, self._at = start, 0
        if first in (b"{", b"["):
            end = self._container_end()
        elif first == b'"':
            end = self._match_end(_STRING, whole=True)
        else:
            end = self._match_end(_SCALAR, whole=False)
        if end == 0:
            raise self.error("expected a value", first)
        self._at = end
        return start, bytes(memoryview(self._buffer)[:end])

    def recover(self, offset: int | None = None) -> bool:
        """Step to the next ``"digits": {`` further on, after an error; False at the end.

        Args:
            offset: look from behind this byte of the last value on, whose end is not known;
                from where the scanner stands where it is not given.
        """
        if offset is not None:
            self._at = max(offset - self._base, 0)
        self._at = min(self._at + 1, len(self._buffer))
        while True:
            match = _QUERY_KEY.search(self._buffer, self._at)
            at = match.start() if match else -1
            del match  # it would keep the buffer from growing
            if at >= 0:
                self._at = at
                return True
            keep = max(self._at, len(self._buffer) - 256)
            self._base += keep
            del self._buffer[:keep]
            self._at = 0
            if not self._fill():
                self._at = len(self._buffer)
                return False

    def error(self, what: str, found: bytes) -> LeverError:
        """An error at the current offset; an empty ``found`` means that the text ended."""
        if not found:
            return self._cut_short(self.offset)
        return LeverError(
            f"not valid JSON: {what}",
            where=f"{self._name}, byte {self.offset}",
            value=bytes(self._buffer[self._at : self._at + 40]),
        )

    def _container_end(self) -> int:
        """Index behind the closing bracket of the container that opens at index 0."""
        depth, at = 0, 0
        while True:
            at, depth, done = balance(self._buffer, at, depth)
            if done:
                return at
            self._grow()

    def _match_end(self, pattern: re.Pattern[bytes], whole: bool) -> int:
        while True:
            match = pattern.match(self._buffer)
            end = match.end() if match else -1
            del match  # it would keep the buffer from growing
            if end >= 0 and (whole or end < len(self._buffer) or self._ended):
                return end
            if not whole and not self._fill():
                return end
            if whole:
                self._grow()

    def _grow(self) -> None:
        """Double the buffer within the limit of one value; the text must go on."""
        size = len(self._buffer)
        while len(self._buffer) < 2 * size:
            if not self._fill():
                if len(self._buffer) > size:
                    return
                raise self._cut_short(self._base)
            if len(self._buffer) > VALUE_LIMIT:
                raise LeverError(
                    f"a single value is larger than {VALUE_LIMIT >> 20} MB",
                    where=f"{self._name}, byte {self._base}",
                    value=bytes(self._buffer[:40]),
                    hint="is a quotation mark or a bracket missing there?",
                )

    def _fill(self) -> bool:
        data = b"" if self._ended else self._feed()
        self._ended = not data
        if data:
            self._buffer += data
        return bool(data)

    def _cut_short(self, offset: int) -> LeverError:
        return LeverError(
            "the file ends in the middle of a value: it was cut short, or a bracket is missing",
            where=f"{self._name}, byte {offset}",
            value=bytes(self._buffer[:40]) or None,
            hint="copy the file again; --salvage keeps what is whole",
        )


def balance(buffer: bytes | bytearray, at: int, depth: int) -> tuple[int, int, bool]:
    """Go on counting brackets from index ``at``: (where it stands, depth, whether it closed)."""
    for match in _TOKEN.finditer(buffer, at):
        first = buffer[match.start()]
        if first == 0x22:
            if not match.group(1):
                return match.start(), depth, False
        elif first in b"{[":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return match.end(), 0, True
        at = match.end()
    return at, depth, False
