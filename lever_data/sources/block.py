"""Decode one block of legacy data at once, and prove that nothing of it was dropped.

In go a format and the text of a block as one object; out come its Arrow batches, or
RefusedError, and then the careful path takes the block member by member.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lever_data.readers import json_exact
from lever_data.readers.json_exact import Place
from lever_data.sources.layout import Built, Context, Record, RefusedError
from lever_data.sources.types import Made

_QUOTE, _BACKSLASH = 0x22, 0x5C
_PIECE = 1 << 16  # what is compared at once: in the cache, and no new memory each time

Decoded = tuple[Built, Counter[str]]  # the batches, and non-finite numbers stored as null by key


class Format(Protocol):
    """What the reader must know of a kind of data: RL data or beams."""

    context: Context

    def decode_block(self, text: bytes) -> list[Record]:
        """Decode the members of an object's text at once, or raise RefusedError."""

    def decode_value(self, query_id: int, value: object, data: bytes, place: Place) -> Made:
        """Decode one member's value, or raise a LeverError that says what is wrong with it."""

    def build(self, records: Sequence[Record], *, careful: bool = False, tokens: int = -1) -> Built:
        """Make Arrow batches of records; careful: as ``decode_value`` gave them.

        ``tokens`` is what the batches should account for.
        """

    def known(self) -> tuple[Any, ...]:
        """All that decoding depends on, for ``restore``; it can be pickled and compared."""

    @classmethod
    def restore(cls, *known: Any) -> Format:
        """A format that decodes like the one that said ``known``."""


@dataclass(frozen=True)
class State:
    """All that decoding a block depends on, besides its text; it can be pickled.

    ``form`` is the class of the format, ``known`` what its ``restore`` takes.
    """

    form: type[Format]
    known: tuple[Any, ...]


def try_block(form: Format, text: bytes | None) -> Decoded:
    """The batches of a block.

    Raises:
        RefusedError: the block is not cut at a boundary, is not valid, holds keys that the types
            have not learned yet, or two equal keys in one object.
    """
    if text is None:
        raise RefusedError("no boundary")
    try:
        records = form.decode_block(text)
        non_finite: Counter[str] = Counter()
    except RefusedError:
        if b"NaN" not in text and b"Infinity" not in text:
            raise
        clean, non_finite = json_exact.null_non_finite(text)
        records = form.decode_block(clean)
    tokens = count_tokens(text)
    built = form.build(records, tokens=tokens)
    if built.tokens != tokens:
        raise RefusedError("a key occurs twice in one object")
    return built, non_finite


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
