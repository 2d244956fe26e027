"""Cut the text of one giant JSON object into blocks of whole members, at likely boundaries.

In go bytes, out come :class:`Block` records of one and a half megabytes. A boundary is only likely:
the same characters may stand inside a string or a nested object. The caller proves it by decoding
the block: a JSON value that starts with a bracket is never a proper prefix of another one, so a
block that decodes was cut rightly. :func:`count_tokens` serves to prove that nothing was dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lever_data.readers.json_object import BOM

BLOCK = 3 << 19

_BOUNDARY = re.compile(rb'\}(?=[ \t\n\r]*,[ \t\n\r]*"[0-9]+"[ \t\n\r]*:[ \t\n\r]*\{)')
_QUOTE, _BACKSLASH = 0x22, 0x5C
_PIECE = 1 << 16  # what is compared at once: in the cache, and no new memory each time
_COMMA = re.compile(rb"[ \t\n\r]*,[ \t\n\r]*")


@dataclass(frozen=True)
class Block:
    """A stretch of the text of one object; all blocks together are the whole text.

    Attributes:
        offset: uncompressed byte offset of ``buffer[0]``.
        buffer: the block, and behind ``end`` perhaps the beginning of the next one.
        end: length of the block.
        cut: index behind the last member, before its comma; ``None`` where no boundary was found
            (the last block, or a member longer than the block).
        first: the block begins with the opening brace (a byte order mark may precede it).
        last: the text ends with this block.
    """

    offset: int
    buffer: bytes
    end: int
    cut: int | None
    first: bool
    last: bool

    @property
    def data(self) -> bytes:
        """The text of the block."""
        return self.buffer[: self.end]

    def as_object(self) -> tuple[bytes, memoryview, bytes] | None:
        """The block's members as one JSON object, in parts that have to be joined.

        ``None`` where the block is not cut at a boundary.
        """
        start = len(BOM) if self.first and self.buffer.startswith(BOM) else 0
        end = self.end if self.last else self.cut
        if end is None:
            return None
        head = b"" if self.first else b"{"
        tail = b"" if self.last else b"}"
        return head, memoryview(self.buffer)[start:end], tail


def split_blocks(read: Callable[[int], bytes], size: int = BLOCK) -> Iterator[Block]:
    """Cut the text of an object of query members into blocks of about ``size`` bytes.

    Args:
        read: gives up to n bytes, ``b""`` at the end.
        size: bytes of a block; a block without any boundary grows to eight times that.
    """
    offset, first, rest = 0, True, b""
    while True:
        data, ended = _read_block(read, rest, size)
        if ended:
            yield Block(offset, data, len(data), None, first, True)
            return
        cut = _last_boundary(data)
        if cut is None and len(data) < 8 * size:
            rest = data
            continue
        comma = _COMMA.match(data, cut) if cut is not None else None
        end = comma.end() if comma else len(data)
        yield Block(offset, data, end, cut, first, False)
        offset, first, rest = offset + end, False, data[end:]


def _read_block(read: Callable[[int], bytes], rest: bytes, size: int) -> tuple[bytes, bool]:
    """``rest`` and ``size`` further bytes; and whether the text ends there."""
    parts, missing = [rest], size
    while missing > 0:
        part = read(missing)
        if not part:
            return b"".join(parts), True
        parts.append(part)
        missing -= len(part)
    return b"".join(parts), False


def _last_boundary(data: bytes) -> int | None:
    for window in (1 << 14, 1 << 18, len(data)):
        last = None
        for match in _BOUNDARY.finditer(data, max(0, len(data) - window)):
            last = match.end()
        if last is not None:
            return last
    return None


def count_tokens(text: bytes) -> int:
    """String tokens in valid JSON text: unescaped quotation marks, halved."""
    codes = np.frombuffer(text, np.uint8)
    pieces = range(0, len(codes), _PIECE)
    quotes = sum(int(np.count_nonzero(codes[at : at + _PIECE] == _QUOTE)) for at in pieces)
    if b"\\" in text:
        quotes -= _count_escaped(text, codes)
    return quotes // 2


def _count_escaped(text: bytes, codes: np.ndarray) -> int:
    """Quotation marks behind an odd run of backslashes."""
    before = np.flatnonzero(codes[:-1] == _BACKSLASH)
    before = before[codes[before + 1] == _QUOTE]
    is_alone = (before == 0) | (codes[before - 1] != _BACKSLASH)
    count = int(np.count_nonzero(is_alone))
    for at in before[~is_alone].tolist():
        run = text[max(0, at - 63) : at + 1]
        if run.count(b"\\") == 64:  # a longer run: look at all of it
            run = text[: at + 1]
        count += (len(run) - len(run.rstrip(b"\\"))) % 2
    return count
