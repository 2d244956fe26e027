"""The RL data format: one query's value in JSON to typed records, and records to batches.

In goes the text of a block or of one member, out come typed records; what is wrong with a record
is an error that names the field, with its byte offset. The reader around it is ``decode.py``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from lever_data.readers import json_exact
from lever_data.readers.json_exact import Place
from lever_data.sources.layout import Built, Context, Layout, Record, RefusedError
from lever_data.sources.rows import build, find_layout
from lever_data.sources.types import (
    CANDIDATE_FIELDS,
    INFO_FIELDS,
    RESERVED,
    VALUE_FIELDS,
    Made,
    Types,
)

_ERROR_PATH = re.compile(r"^(.*) - at `(?:key` in `)?\$([^`]*)`$", re.DOTALL)
_PATH_PART = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_PLAIN = Types()  # of the careful path: no unknown key is learned, all stand in `rest`


class RlFormat:
    """RL data of one file; learns its layout and its unknown keys while it is read.

    What is learned serves ``decode_block``; ``decode_value`` takes unknown keys as they come.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.layout: Layout | None = None
        self.types = Types(candidate=["vqa_prompt_text"], info=["gt_answers_norm"])
        self._narrow: Types | None = None  # for candidates with the keys of the first one
        self._is_mixed = False  # some block was not of these

    def decode_block(self, text: bytes) -> list[Record]:
        """The queries of an object's text; RefusedError where the types do not take it."""
        if self.layout is not None and not self._is_mixed:
            if self._narrow is None or self._narrow.version != self.types.version:
                self._narrow = self.types.narrowed(self.layout.candidate_keys)
            try:
                return decode_object(self._narrow.block_decoder, text)
            except RefusedError:
                self._is_mixed = True
        return decode_object(self.types.block_decoder, text)

    def decode_value(self, query_id: int, value: object, data: bytes, place: Place) -> Made:
        """One query's value, parsed from ``data`` before, as a typed record.

        Raises:
            LeverError: wrong types, a repeated id, lengths that differ: with field and offset.
        """
        self.types.learn(*unknown_keys(value, data, place))
        _stow(value)
        record = decode_typed(_PLAIN.value_decoder, value, data, place)
        _check_value(query_id, record, data, place)
        return record

    def build(self, records: Sequence[Record], *, careful: bool = False, tokens: int = -1) -> Built:
        """Record batches of these queries, in their order.

        Args:
            careful: the records are of ``decode_value``.
            tokens: what the batches must account for, if they can.
        """
        types = _PLAIN if careful else self.types
        if self.layout is None:
            self.layout = find_layout(records, types)
        built = build(records, types, self.layout, self.context, all_keys=careful)
        if careful or built.tokens == tokens:
            return built
        return build(records, types, self.layout, self.context, all_keys=True)


def decode_object(decoder: msgspec.json.Decoder[Any], text: bytes) -> list[Record]:
    """The members of an object's text, by a typed decoder.

    Raises:
        RefusedError: it is not valid, or holds what the types do not know.
    """
    try:
        records = list(decoder.decode(text).items())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(str(error)) from None
    for query_id, _ in records:
        if not 0 <= query_id < 2**63 or (query_id == 0 and b'"-0"' in text):
            raise RefusedError("a query key")
    return records


def unknown_keys(value: object, data: bytes, place: Place) -> tuple[set[str], set[str], set[str]]:
    """Keys the types do not know: of candidates, of the ``query`` object, of the value."""
    if not isinstance(value, dict):
        return set(), set(), set()
    info, candidates = value.get("query"), value.get("pointer_candidates")
    objects = [c for c in candidates if isinstance(c, dict)] if isinstance(candidates, list) else []
    found = (
        {key for c in objects for key in c if key not in CANDIDATE_FIELDS},
        {key for key in info if key not in INFO_FIELDS} if isinstance(info, dict) else set(),
        {key for key in value if key not in VALUE_FIELDS},
    )
    if any(RESERVED in keys for keys in found):
        raise place.error(f"the key {RESERVED} is reserved", value=data[:40])
    return found


def _stow(value: object) -> None:
    """Move unknown keys under RESERVED, which the types take as ``rest``."""
    if not isinstance(value, dict):
        return
    info, candidates = value.get("query"), value.get("pointer_candidates")
    _stow_one(value, VALUE_FIELDS)
    _stow_one(info, INFO_FIELDS)
    for candidate in candidates if isinstance(candidates, list) else []:
        _stow_one(candidate, CANDIDATE_FIELDS)


def _stow_one(record: object, fields: Container[str]) -> None:
    if isinstance(record, dict):
        rest = {key: record.pop(key) for key in list(record) if key not in fields}
        if rest:
            record[RESERVED] = rest


def decode_typed(
    decoder: msgspec.json.Decoder[Any], value: object, data: bytes, place: Place
) -> Made:
    """A parsed value as the decoder's type; its refusal becomes an error with field and offset."""
    text = json_exact.encode(value, data, place)
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        what, path = parse_error(str(error))
        raise place.field_error(what, data, path) from None
    except RecursionError:
        raise place.error("the value is nested too deeply", value=data[:40]) from None


def parse_error(message: str) -> tuple[str, json_exact.Path]:
    """Split a decoder's message into what is wrong and the path of the field."""
    match = _ERROR_PATH.match(message)
    if match is None:
        return message, ()
    parts = _PATH_PART.findall(match.group(2))
    return match.group(1), tuple(int(i) if i else name for name, i in parts)


def _check_value(query_id: int, value: Made, data: bytes, place: Place) -> None:
    """Rules between fields: repeated ids, lengths that differ, a query id that is another one."""
    if value.query and value.query.query_id not in (UNSET, query_id):
        what = "query_id differs from the key of the query"
        raise place.field_error(what, data, ("query", "query_id"))
    for index, candidate in enumerate(value.pointer_candidates):
        path = ("pointer_candidates", index, "pointer")
        if len(set(candidate.pointer)) != len(candidate.pointer):
            raise place.field_error("a pointer repeats an id", data, path)
        position = candidate.pointer_pos
        if isinstance(position, list) and len(position) != len(candidate.pointer):
            what = f"pointer has {len(candidate.pointer)} ids, pointer_pos {len(position)}"
            raise place.field_error(what, data, ("pointer_candidates", index, "pointer_pos"))
