"""The queries of RL data: what a block of records says beside its candidates, as a table.

In go records that ``rl.py`` decoded; out comes a row per query, and how many string tokens were
taken over, which proves that nothing was dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from msgspec import UNSET

from lever_data.sources.fields import (
    INFO_FIELDS,
    RESERVED,
    VALUE_FIELDS,
    Context,
    FaultError,
    Layout,
    Record,
    RefusedError,
    count_strings,
    info_keys,
    present,
    repeat,
    to_json,
)
from lever_data.sources.rl_record import answers_of, or_none, pool_holds, query_pool
from lever_data.store import schema


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
    if layout.value_keys == ("pointer_candidates",) and all(map(is_plain, records)):
        tokens = 2 * len(records)  # the id and the one key; seven times faster to know
    else:
        arrays |= _query_columns(records)
        extras = [to_json(_query_extra(record, layout)) for record in records]
        arrays["extra"] = pa.array(extras, pa.string())
        tokens = sum(map(_count_query, records))
    columns = [arrays.get(f.name, pa.nulls(len(records), f.type)) for f in schema.QUERIES]
    return pa.RecordBatch.from_arrays(columns, schema=schema.QUERIES), tokens


def is_plain(record: Record) -> bool:
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
