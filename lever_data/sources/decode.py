"""Decode legacy RL and beam data into Arrow batches of the store's tables.

In go the bytes of one giant JSON object (query id → value), out come the batches of the two tables
in file order. The text is cut into blocks of whole members at likely boundaries, and a block is
decoded at once by the typed decoder of its format; only where that refuses are its members taken
one by one by the careful path, which reads what is unusual (NaN in lists, whole numbers written as
floats) and says exactly what is wrong.

A boundary is only likely: the same characters may stand inside a string or a nested object. That
the block decodes proves it: a JSON value that starts with a bracket is never a proper prefix of
another one. :func:`count_tokens` serves to prove that nothing was dropped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lever_data.errors import LeverError
from lever_data.readers import json_exact
from lever_data.readers.json_exact import NotJsonError, Place
from lever_data.readers.json_object import BOM, Member, Scanner
from lever_data.sources.fields import Batches, Format, Record, RefusedError

BLOCK = 3 << 19

_BOUNDARY = re.compile(rb'\}(?=[ \t\n\r]*,[ \t\n\r]*"[0-9]+"[ \t\n\r]*:[ \t\n\r]*\{)')
_QUOTE, _BACKSLASH = 0x22, 0x5C
_PIECE = 1 << 16  # what is compared at once: in the cache, and no new memory each time
_COMMA = re.compile(rb"[ \t\n\r]*,[ \t\n\r]*")
TOP_LIMIT = 4 << 20  # bytes of `_…` members, which are kept in the manifest
BATCH_BYTES = 4 << 20  # of text, per batch of the careful path
_MAX_SKIPPED = 1000

_QUERY_ID = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass
class Findings:
    """What one file turned out to hold, gathered while it is read.

    Attributes:
        top: its ``_…`` members.
        non_finite: NaN and infinite numbers stored as null, by key.
        skipped: with salvage, what was left out and why (the first thousand).
        num_skipped: how many were left out.
    """

    top: dict[str, Any] = field(default_factory=dict)
    non_finite: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    num_skipped: int = 0

    def skip(self, error: LeverError) -> None:
        """Note something left out."""
        self.num_skipped += 1
        if len(self.skipped) < _MAX_SKIPPED:
            self.skipped.append(error.message())


class RestartError(Exception):
    """``_meta`` came behind the first queries: read again, knowing its scorer."""

    def __init__(self, scorer: str) -> None:
        super().__init__(scorer)
        self.scorer = scorer


class LegacyReader:
    """Reads one file of RL or beam data.

    Args:
        read: gives up to n uncompressed bytes, ``b""`` at the end.
        name: the file, for messages.
        form: the kind of data.
        salvage: leave out what is broken, and note it, instead of raising.
        block: bytes of text decoded at once; of the results only the layout, which is that of the
            first block, depends on it.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        name: str,
        form: Format,
        *,
        salvage: bool = False,
        block: int = BLOCK,
    ) -> None:
        self._read = read
        self._name = name
        self._format = form
        self._salvage = salvage
        self._block = block
        self._seen = _SeenIds()
        self._top_bytes = 0
        self._astray: int | None = None  # offset of a value whose end is not known
        self.num_queries = 0
        self.found = Findings()

    def batches(self) -> Iterator[Batches]:
        """The file's rows in file order, in batches of about a block of text.

        Raises:
            LeverError: the text or a record is wrong: file, byte offset, query, field, value.
            RestartError: the scorer became known too late.
        """
        blocks = split_blocks(self._safe_read, self._block)
        for block in blocks:
            try:
                yield self._at_once(block)
            except RefusedError:
                yield from self._careful(block, blocks)

    def _safe_read(self, size: int) -> bytes:
        try:
            return self._read(size)
        except LeverError as error:
            if not self._salvage:
                raise
            self.found.skip(error)
            return b""

    def _at_once(self, block: Block) -> Batches:
        """Decode a whole block, and prove that nothing of it was dropped.

        Raises:
            RefusedError: it is not cut at a boundary, is not valid or not as its types want it, or
                holds a query that was there before.
        """
        parts = block.as_object()
        if parts is None:
            raise RefusedError("no boundary")
        text = b"".join(parts)
        non_finite: Counter[str] = Counter()
        try:
            built = self._format.read_block(text)
        except RefusedError:
            if b"NaN" not in text and b"Infinity" not in text:
                raise
            clean, non_finite = json_exact.null_non_finite(text)
            built = self._format.read_block(clean)
        if not self._seen.add(built.queries["query_id"].to_numpy()):
            raise RefusedError("a query occurs twice")
        self.num_queries += built.queries.num_rows
        self.found.non_finite += non_finite
        return built

    def _careful(self, block: Block, blocks: Iterator[Block]) -> Iterator[Batches]:
        """Take the members one by one, from ``block`` to the next end of a block."""
        feed = _Feed(block, blocks)
        scanner = Scanner(feed, self._name, block.offset)
        records: list[Record] = []
        size = 0
        for member in self._members(scanner, feed):
            try:
                record = self._record(member)
            except LeverError as error:
                if not self._salvage:
                    raise
                self.found.skip(error)
                if isinstance(error, NotJsonError):
                    self._astray = member.value_offset
                continue
            if record is not None:
                records.append(record)
                size += len(member.value)
            if size > BATCH_BYTES:
                yield self._format.build(records)
                records, size = [], 0
        if records:
            yield self._format.build(records)

    def _members(self, scanner: Scanner, feed: _Feed) -> Iterator[Member]:
        if feed.block.first:
            scanner.skip_bom()
            if not scanner.enter(b"{", "an object: { … }"):
                scanner.finish()
                return
        while True:
            try:
                yield scanner.member()
                if self._astray is not None:
                    offset, self._astray = self._astray, None
                    if not scanner.recover(offset):
                        return
                    continue
                if not scanner.more(b"}"):
                    scanner.finish()
                    return
            except LeverError as error:
                if not self._salvage:
                    raise
                self.found.skip(error)
                if not scanner.recover():
                    return
                continue
            if scanner.is_drained() and not feed.block.last:
                return

    def _record(self, member: Member) -> Record | None:
        """One query; ``None`` for a ``_…`` member, which is kept apart."""
        at_key = Place(self._name, member.key_offset)
        key, _ = json_exact.parse(member.key, at_key)
        assert isinstance(key, str)
        if key.startswith("_"):
            self._keep_top(key, member)
            return None
        if not _QUERY_ID.fullmatch(key) or int(key) >= 2**63:
            raise at_key.error("a query key must be a plain decimal integer", value=key)
        place = Place(self._name, member.value_offset, key)
        value, non_finite = json_exact.parse(member.value, place)
        on_fault = self.found.skip if self._salvage else None
        record = self._format.read_value(int(key), value, member.value, place, on_fault)
        if not self._seen.add(np.array([int(key)])):
            raise Place(self._name, member.key_offset, key).error("a query occurs twice")
        self.found.non_finite += non_finite
        self.num_queries += 1
        return record

    def _keep_top(self, key: str, member: Member) -> None:
        place = Place(self._name, member.value_offset)
        value, non_finite = json_exact.parse(member.value, place)
        if key in self.found.top:
            raise Place(self._name, member.key_offset).error("a key occurs twice", value=key)
        self._top_bytes += len(member.value)
        if self._top_bytes > TOP_LIMIT:
            raise place.error(f"members that begin with _ exceed {TOP_LIMIT >> 20} MB", value=key)
        json_exact.encode(key, member.key, Place(self._name, member.key_offset))
        json_exact.encode(value, member.value, place)
        scorer = value.get("vqa_model") if key == "_meta" and isinstance(value, dict) else None
        context = self._format.context
        if isinstance(scorer, str) and context.scorer is None:
            if self.num_queries:
                raise RestartError(scorer)
            self._format.context = replace(context, scorer=scorer)
        self.found.top[key] = value
        self.found.non_finite += non_finite


class _Feed:
    """Bytes for a scanner: a block, then, if it asks for more, those behind it."""

    def __init__(self, block: Block, blocks: Iterator[Block]) -> None:
        self.block = block  # the last one given out, or the first one
        self._pending = [block]
        self._blocks = blocks

    def __call__(self) -> bytes:
        if not self._pending:
            following = next(self._blocks, None)
            if following is None:
                return b""
            self.block = following
            self._pending.append(following)
        return self._pending.pop().data


class _SeenIds:
    """Query ids met so far: a table of bytes for ids below 2^25 (33 MB at most), else a set."""

    def __init__(self) -> None:
        self._low = np.zeros(1 << 14, dtype=bool)
        self._high: set[int] = set()

    def has_any(self, ids: np.ndarray) -> bool:
        """Whether any of these ids was met before."""
        low = ids[ids < len(self._low)]
        return bool(self._low[low].any()) or (
            bool(self._high) and not self._high.isdisjoint(ids.tolist())
        )

    def add(self, ids: np.ndarray) -> bool:
        """Remember these ids; False, and nothing is remembered, where one was met before."""
        if self.has_any(ids):
            return False
        low = ids[ids < 1 << 25]
        if low.size:
            if int(low.max()) >= len(self._low):
                grown = np.zeros(1 << int(low.max()).bit_length(), dtype=bool)
                grown[: len(self._low)] = self._low
                self._low = grown
            self._low[low] = True
        self._high.update(ids[ids >= 1 << 25].tolist())
        return True


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
