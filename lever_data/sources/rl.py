"""The RL data format: the text of one query or of a whole block to Arrow batches.

A block is decoded at once by the types of ``fields.py``; the count of its string tokens proves
that nothing was dropped. One query by itself is taken carefully: what is wrong with it is an error
that names the field, with its byte offset. The reader around both is ``decode.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lever_data.errors import LeverError
from lever_data.readers import json_exact
from lever_data.readers.json_blocks import count_tokens
from lever_data.readers.json_exact import Place
from lever_data.sources import fields
from lever_data.sources.fields import (
    CANDIDATE_FIELDS,
    RESERVED,
    VALUE_FIELDS,
    Batches,
    Context,
    FaultError,
    Layout,
    Record,
    RefusedError,
    Rest,
    info_keys,
    present,
)
from lever_data.sources.rl_batches import candidate_batch, check_query, query_batch

_ERROR_PATH = re.compile(r"^(.*) - at `(?:key` in `)?\$([^`]*)`$", re.DOTALL)
_PATH_PART = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_INTEGERS = ("pointer", "pointer_global", "pointer_pos", "beam_rank", "vqa_correct")

OnFault = Callable[[LeverError], None]


class RlFormat:
    """RL data of one file; learns its layout while it is read."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.layout: Layout | None = None
        self.methods: set[str | None] = set()  # every gen_method met
        self._has_unknown = False  # some block held keys that lever does not know
        self._block = msgspec.json.Decoder(dict[int, fields.Value])  # type: ignore[valid-type]
        self._plain_block = msgspec.json.Decoder(dict[int, Any])
        self._value = msgspec.json.Decoder(fields.Value)

    def read_block(self, text: bytes) -> Batches:
        """The queries of an object's text.

        Raises:
            RefusedError: the types do not take it, a rule is broken, or a key occurs twice.
        """
        records = decode_object(self._block, text)
        tokens = count_tokens(text)
        built = None if self._has_unknown else self._build(records)
        if built is None or built.tokens != tokens:
            records = self._with_unknown(records, text)
            built = self._build(records)
            self._has_unknown = True  # what one block has the next will have
        if built.tokens != tokens:
            raise RefusedError("a key occurs twice in one object")
        self.layout = self.layout or find_layout(records)
        return built

    def _with_unknown(self, records: Sequence[Record], text: bytes) -> list[Record]:
        """The records of a block with the keys that the types passed over."""
        rests = [Rest.of(plain.value) for plain in decode_object(self._plain_block, text)]
        if any(rest.has_reserved() for rest in rests):
            raise RefusedError("a reserved key")
        return [record._replace(rest=rest) for record, rest in zip(records, rests, strict=True)]

    def read_value(
        self,
        query_id: int,
        value: object,
        data: bytes,
        place: Place,
        on_fault: OnFault | None = None,
    ) -> Record:
        """One query's value, parsed from ``data`` before.

        Args:
            on_fault: told of a candidate that is left out; ``None`` raises instead.

        Raises:
            LeverError: wrong types, numbers out of range, a repeated id, lengths that differ: with
                field and offset.
        """
        try:
            try:
                return self._decode(query_id, value, data, place)
            except FaultError:
                if on_fault is None or not isinstance(value, dict):
                    raise
                value = self._without_faults(query_id, value, data, place, on_fault)
                return self._decode(query_id, value, data, place)
        except FaultError as fault:
            raise place.field_error(fault.what, data, fault.path) from None

    def _without_faults(
        self, query_id: int, value: dict[str, Any], data: bytes, place: Place, on_fault: OnFault
    ) -> dict[str, Any]:
        """The value without the candidates that have a fault of their own."""
        candidates = value.get("pointer_candidates")
        kept = []
        for index, candidate in enumerate(candidates if isinstance(candidates, list) else []):
            try:
                self._decode(query_id, {**value, "pointer_candidates": [candidate]}, data, place)
            except FaultError as fault:
                if fault.path[:2] == ("pointer_candidates", 0):
                    path = ("pointer_candidates", index, *fault.path[2:])
                    on_fault(place.field_error(fault.what, data, path))
                    continue
            kept.append(candidate)
        return {**value, "pointer_candidates": kept} if isinstance(candidates, list) else value

    def _decode(self, query_id: int, value: object, data: bytes, place: Place) -> Record:
        _take_whole_numbers(value)
        text = json_exact.encode(value, data, place)
        record = Record(query_id, decode_text(self._value, text, data, place))
        record = record._replace(rest=Rest.of(msgspec.json.decode(text)))
        if record.rest and record.rest.has_reserved():
            raise place.error(f"the key {RESERVED} is reserved", value=data[:40])
        check_query(record)
        return record

    def build(self, records: Sequence[Record]) -> Batches:
        """Record batches of these queries, in their order.

        Raises:
            RefusedError: a rule between fields is broken.
        """
        self.layout = self.layout or find_layout(records)
        return self._build(records)

    def _build(self, records: Sequence[Record]) -> Batches:
        layout = self.layout or find_layout(records)
        candidates, tokens = candidate_batch(records, layout, self.context)
        queries, more = query_batch(records, layout, self.context)
        every = (record.value.pointer_candidates for record in records)
        self.methods |= {one.gen_method or None for some in every for one in some}
        return Batches(candidates, queries, tokens + more)


def find_layout(records: Sequence[Record]) -> Layout:
    """The layout of a file, taken from its first query that has a candidate."""
    for record in records:
        for candidate in record.value.pointer_candidates[:1]:
            return Layout(
                present(candidate, CANDIDATE_FIELDS),
                present(record.value, VALUE_FIELDS),
                info_keys(record),
                "vqaEval" if candidate.vqa_eval_mode == "vqaEval" else "file",
            )
    last = records[-1] if records else None
    if last is None:
        return Layout((), ("pointer_candidates",), None, "file")
    return Layout((), present(last.value, VALUE_FIELDS), info_keys(last), "file")


def decode_object(decoder: msgspec.json.Decoder[Any], text: bytes) -> list[Record]:
    """The members of an object's text, by a typed decoder.

    Raises:
        RefusedError: it is not valid, or holds what the types do not take.
    """
    try:
        members = decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(str(error)) from None
    for query_id in members:
        if not 0 <= query_id < 2**63 or (query_id == 0 and b'"-0"' in text):
            raise RefusedError("a query key")
    return [Record(query_id, value) for query_id, value in members.items()]


def decode_typed(
    decoder: msgspec.json.Decoder[Any], value: object, data: bytes, place: Place
) -> Any:
    """A value, parsed from ``data`` before, as the decoder's type.

    Raises:
        LeverError: the type does not take it, with field and offset.
    """
    try:
        return decode_text(decoder, json_exact.encode(value, data, place), data, place)
    except FaultError as fault:
        raise place.field_error(fault.what, data, fault.path) from None


def decode_text(decoder: msgspec.json.Decoder[Any], text: bytes, data: bytes, place: Place) -> Any:
    """The clean text of a value as the decoder's type.

    Raises:
        FaultError: the type does not take it.
        LeverError: it is nested too deeply.
    """
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _fault(str(error)) from None
    except RecursionError:
        raise place.error("the value is nested too deeply", value=data[:40]) from None


def _fault(message: str) -> FaultError:
    """A decoder's message, split into what is wrong and the path of the field."""
    match = _ERROR_PATH.match(message)
    if match is None:
        return FaultError(message)
    parts = _PATH_PART.findall(match.group(2))
    return FaultError(match.group(1), *(int(i) if i else name for name, i in parts))


def _take_whole_numbers(value: object) -> None:
    """Make integers of what pandas writes for them: 0.0 for 0, true for 1."""
    records = value.get("pointer_candidates") if isinstance(value, dict) else None
    for record in records if isinstance(records, list) else []:
        if isinstance(record, dict):
            record |= {key: _whole(record[key]) for key in _INTEGERS if key in record}
            if isinstance(record.get("vqa_correct"), bool):
                record["vqa_correct"] = int(record["vqa_correct"])


def _whole(value: object) -> object:
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
