"""The RL data format: a whole block of text to Arrow batches, column by column.

A block is decoded at once by the types of ``fields.py``; the count of its string tokens proves
that nothing was dropped, and the rules between fields are checked over whole columns: a block that
breaks one is refused, and ``rl_record.py`` takes its queries one by one. The reader around both is
``decode.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import UNSET

from lever_data.older import NAMES
from lever_data.sources import fields
from lever_data.sources.decode import count_tokens
from lever_data.sources.fields import (
    CANDIDATE_FIELDS,
    EVAL_MODES,
    INFO_FIELDS,
    RESERVED,
    VALUE_FIELDS,
    Batches,
    Context,
    FaultError,
    Layout,
    Record,
    RefusedError,
    Rest,
    count_strings,
    info_keys,
    present,
    repeat,
    to_json,
)
from lever_data.sources.rl_record import (
    VERDICT,
    answers_of,
    contradiction,
    has_positions,
    or_none,
    pool_holds,
    query_pool,
    read_record,
    resolve_pointer,
)
from lever_data.store import schema

Columns = dict[str, Sequence[Any]]  # key in JSON → its value in every candidate, or UNSET


class RlFormat:
    """RL data of one file; learns its layout while it is read."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.layout: Layout | None = None
        self.methods: set[str | None] = set()  # every gen_method met
        self._has_unknown = False  # some block held keys that lever does not know
        self._block = msgspec.json.Decoder(dict[int, fields.Value])  # type: ignore[valid-type]
        self._plain_block = msgspec.json.Decoder(dict[int, Any])

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

    read_value = staticmethod(read_record)

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


def candidate_batch(
    records: Sequence[Record], layout: Layout, context: Context
) -> tuple[pa.RecordBatch, int]:
    """The candidates of ``records`` in their order, and their string tokens.

    Raises:
        RefusedError: a rule between fields is broken.
    """
    counts = np.array([len(r.value.pointer_candidates) for r in records], dtype=np.int64)
    rows = int(counts.sum())
    columns, absent = _columns(records, rows)
    arrays, tokens = {}, sum(rows - number for number in absent.values())
    for key, (column, _) in CANDIDATE_FIELDS.items():
        if key in ("pointer", "pointer_global", "pointer_pos"):
            continue
        kind = schema.CANDIDATES.field(column).type
        values = columns.get(key)
        if values is None:
            arrays[column] = pa.nulls(rows, kind)
            continue
        if absent[key]:
            values = [None if value is UNSET else value for value in values]
        arrays[column] = pa.array(_stored(key, values), kind)
        if pa.types.is_string(kind):
            tokens += rows - (
                values.count(None) if key == "vqa_eval_mode" else arrays[column].null_count
            )
        elif key == "shot_scores":
            tokens += count_strings(msgspec.to_builtins(values))
    arrays |= _pointers(records, columns)
    if "error" in columns.get("vqa_eval_mode", ()):
        pairs = zip(columns["vqa_eval_mode"], arrays["eval_failed"].to_pylist(), strict=True)
        arrays["eval_failed"] = pa.array([mode == "error" or f for mode, f in pairs], pa.bool_())
    _require_sense(columns, rows)
    if absent.get("scorer", rows):  # of rows that do not name one it is the file's
        named = columns.get("scorer", [UNSET] * rows)
        scorers = [context.scorer if value is UNSET else value for value in named]
        arrays["scorer"] = pa.array(scorers, pa.string())
    arrays["extra"], more = _extra(records, _notes(columns, absent, layout, rows), rows)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.array([record.query_id for record in records], dtype=np.int64)
    arrays |= {
        "dataset": repeat(context.dataset, rows),
        "split": repeat(context.split, rows),
        "query_id": pa.array(np.repeat(ids, counts)),
        "candidate": pa.array((np.arange(rows) - starts).astype(np.int32)),
        "shot_num": pa.array(_lengths(arrays["pointer"]).astype(np.int8)),
    }
    batch = pa.RecordBatch.from_arrays(
        [arrays[f.name] for f in schema.CANDIDATES], schema=schema.CANDIDATES
    )
    return batch, tokens + more


def _columns(records: Sequence[Record], rows: int) -> tuple[Columns, dict[str, int]]:
    """The known keys that any candidate has, and how many candidates lack each of these.

    All are taken out in one go, which is fastest.
    """
    structs = chain.from_iterable(record.value.pointer_candidates for record in records)
    every = zip(*map(msgspec.structs.astuple, structs), strict=True)
    columns: Columns = {}
    absent: dict[str, int] = {}
    for key, values in zip(CANDIDATE_FIELDS, every, strict=False):
        missing = values.count(UNSET)
        if missing < rows:
            columns[key], absent[key] = values, missing
    return columns, absent


def _stored(key: str, values: Sequence[Any]) -> Sequence[Any]:
    """What the store holds for the values of a key."""
    if key == "shot_scores":
        rows = msgspec.to_builtins(values)
        return [
            row and [{NAMES.get(k, k): v for k, v in one.items()} for one in row] for row in rows
        ]
    if key == "vqa_eval_mode" and not EVAL_MODES.keys().isdisjoint(set(values)):
        return [EVAL_MODES.get(value, value) for value in values]
    return values


def _pointers(records: Sequence[Record], columns: Columns) -> dict[str, pa.Array]:
    """The columns pointer and pointer_pos.

    Raises:
        RefusedError: a pointer repeats an id, or its positions are not those of its ids.
    """
    pointers, positions = columns.get("pointer", ()), columns.get("pointer_pos")
    is_plain = "pointer_global" not in columns and all(map(_is_plain, records))
    if not is_plain and ("pointer_global" in columns or any(map(has_positions, records))):
        try:
            pairs = [
                resolve_pointer(record, index)
                for record in records
                for index in range(len(record.value.pointer_candidates))
            ]
        except FaultError as fault:
            raise RefusedError(fault.what) from None
        pointers, positions = zip(*pairs, strict=True) if pairs else ((), ())
    elif positions is not None:
        positions = [None if value is UNSET else value for value in positions]
    ids = pa.array(pointers, schema.CANDIDATES.field("pointer").type)
    kind = schema.CANDIDATES.field("pointer_pos").type
    places = pa.nulls(len(ids), kind) if positions is None else pa.array(positions, kind)
    lengths = _lengths(ids)
    keys = np.repeat(np.arange(len(ids), dtype=np.int64) << 32, lengths) | ids.values.to_numpy()
    keys.sort()
    if (keys[1:] == keys[:-1]).any():
        raise RefusedError("a pointer repeats an id")
    if positions is not None:  # is_valid() imports 0.1 s of pyarrow
        has_places = places.is_valid().to_numpy(zero_copy_only=False)
        if (lengths != _lengths(places))[has_places].any():
            raise RefusedError("pointer and pointer_pos differ in length")
    return {"pointer": ids, "pointer_pos": places}


def _lengths(lists: pa.ListArray) -> np.ndarray:
    """Elements of every list, int32; 0 for null."""
    return np.diff(lists.offsets.to_numpy())


def _require_sense(columns: Columns, rows: int) -> None:
    """Refuse a block with a score that contradicts another one of its row."""
    looked_at = [columns.get(key, [UNSET] * rows) for key in VERDICT]
    for combination in set(zip(*looked_at, strict=True)):  # few are distinct
        if contradiction(*map(or_none, combination)):
            raise RefusedError("scores that contradict each other")


def _extra(
    records: Sequence[Record], notes: list[dict[str, Any]], rows: int
) -> tuple[pa.Array, int]:
    """Unknown keys as one JSON object a row with what export needs besides; their tokens."""
    if not notes and not any(record.rest for record in records):
        return pa.nulls(rows, pa.string()), 0
    rests = chain.from_iterable(
        record.rest.candidates if record.rest else [{}] * len(record.value.pointer_candidates)
        for record in records
    )
    texts, tokens = [], 0
    for row, members in enumerate(rests):
        tokens += count_strings(members)
        whole = dict(sorted(members.items())) | (notes[row] if notes else {})
        texts.append(to_json(whole or None))  # sorted: the same text on every path
    return pa.array(texts, pa.string()), tokens


def _notes(
    columns: Columns, absent: dict[str, int], layout: Layout, rows: int
) -> list[dict[str, Any]]:
    """Per row, how it deviates from the layout; empty where no row does."""
    known = list(columns)
    mixed = [key for key in known if absent[key]]
    modes = set(columns.get("vqa_eval_mode", ())) - {None, UNSET}
    odd = {mode for mode in modes if layout.spelled(EVAL_MODES.get(mode, mode)) != mode}
    if not mixed and not odd and (not rows or tuple(known) == layout.candidate_keys):
        return []
    looked_at = [columns[key] for key in mixed]
    looked_at.append(columns.get("vqa_eval_mode", [None] * rows))
    looked_at.append(columns.get("eval_failed", [UNSET] * rows))
    cache: dict[Any, dict[str, Any]] = {}
    notes = []
    for *values, mode, failed in zip(*looked_at, strict=True):
        lacks = tuple(key for key, value in zip(mixed, values, strict=True) if value is UNSET)
        signature = (lacks, mode if mode in odd else None, failed if mode == "error" else None)
        if signature not in cache:
            note: dict[str, Any] = {}
            keys = tuple(key for key in known if key not in lacks)
            if keys != layout.candidate_keys:
                note["keys"] = list(keys)
            if mode in odd:
                note["vqa_eval_mode"] = mode
            if mode == "error" and failed is not UNSET and failed is not True:
                note["eval_failed"] = failed
            cache[signature] = {RESERVED: note} if note else {}
        notes.append(cache[signature])
    return notes


def query_batch(
    records: Sequence[Record], layout: Layout, context: Context
) -> tuple[pa.RecordBatch, int]:
    """A row per query, and the string tokens outside its candidates.

    Raises:
        RefusedError: a query's id is not its key, or its fields contradict each other.
    """
    arrays = {
        "dataset": repeat(context.dataset, len(records)),
        "split": repeat(context.split, len(records)),
        "query_id": pa.array([record.query_id for record in records], pa.int64()),
    }
    if layout.value_keys == ("pointer_candidates",) and all(map(_is_plain, records)):
        tokens = 2 * len(records)  # the id and the one key; seven times faster to know
    else:
        arrays |= _query_columns(records)
        extras = [to_json(_query_extra(record, layout)) for record in records]
        arrays["extra"] = pa.array(extras, pa.string())
        tokens = sum(map(_count_query, records))
    columns = [arrays.get(f.name, pa.nulls(len(records), f.type)) for f in schema.QUERIES]
    return pa.RecordBatch.from_arrays(columns, schema=schema.QUERIES), tokens


def _is_plain(record: Record) -> bool:
    """Whether a query holds its candidates and nothing else."""
    value = record.value
    return (
        record.rest is None
        and value.query is UNSET
        and (value.candidate_pool_indices is UNSET and value.candidate_pool_ids is UNSET)
    )


def _query_columns(records: Sequence[Record]) -> dict[str, pa.Array]:
    infos = [record.value.query or None for record in records]
    for record, info in zip(records, infos, strict=True):
        if info is not None and info.query_id not in (UNSET, record.query_id):
            raise RefusedError("a query_id differs from its key")
    try:
        pools = [query_pool(record) for record in records]
        answers = [None if info is None else answers_of(info) for info in infos]
    except FaultError as fault:
        raise RefusedError(fault.what) from None
    if not all(p is None or pool_holds(r, p) for r, p in zip(records, pools, strict=True)):
        raise RefusedError("a pool without what its pointers name")
    found = {
        key: [None if info is None else or_none(getattr(info, key)) for info in infos]
        for key in ("question_id", "image_id", "question")
    }
    found |= {"gt_answers": answers, "candidate_pool": pools}
    return {key: pa.array(v, schema.QUERIES.field(key).type) for key, v in found.items()}


def _query_extra(record: Record, layout: Layout) -> dict[str, Any] | None:
    """Unknown keys of a query's value and of its ``query`` object, and its deviations."""
    inner = dict(record.rest.info) if record.rest else {}
    members = dict(record.rest.value) if record.rest else {}
    clash = {key: inner.pop(key) for key in list(inner) if key in members}
    members = dict(sorted((members | inner).items()))  # the same text on every path
    keys, query_keys = present(record.value, VALUE_FIELDS), info_keys(record)
    note: dict[str, Any] = {}
    if (keys, query_keys) != (layout.value_keys, layout.query_keys):
        note = {"keys": keys, "query_keys": query_keys}
    if clash:
        note["query_extra"] = clash
    answers = or_none(record.value.query.gt_answers_raw) if record.value.query else None
    if any(isinstance(answer, dict) for answer in answers or ()):
        note["gt_answers_raw"] = answers
    if note:
        members[RESERVED] = note
    return members or None


def _count_query(record: Record) -> int:
    """String tokens of one query outside its candidates: its id, keys and strings."""
    tokens = 1 + len(present(record.value, VALUE_FIELDS))
    if record.rest is not None:
        tokens += count_strings(record.rest.value) + count_strings(record.rest.info)
    if record.value.query:
        known = [getattr(record.value.query, key) for key in INFO_FIELDS]
        tokens += sum(1 + count_strings(value) for value in known if value is not UNSET)
    return tokens
