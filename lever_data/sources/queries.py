"""The queries table of RL data: one row per query, its unknown keys kept in ``extra``.

In go (query id, value) records; out come a record batch and the string tokens it accounts for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from msgspec import UNSET

from lever_data.sources.layout import (
    Context,
    Layout,
    Record,
    RefusedError,
    count_strings,
    info_keys,
    learned_keys,
    present,
    repeat,
    to_json,
)
from lever_data.sources.types import INFO_FIELDS, RESERVED, VALUE_FIELDS, Made, Types
from lever_data.store import schema

_PLAIN = ("pointer_candidates",)


def query_batch(
    records: Sequence[Record], types: Types, layout: Layout, context: Context
) -> tuple[pa.RecordBatch, int]:
    """The rows of ``records`` in their order; -1 tokens where there are keys outside the types.

    Raises:
        RefusedError: a query's id is not its key.
    """
    infos = [value.query if value.query else None for _, value in records]
    for (query_id, _), info in zip(records, infos, strict=True):
        if info is not None and info.query_id not in (UNSET, query_id):
            raise RefusedError("a query_id differs from its key")
    pools = [value.candidate_pool_indices for _, value in records]
    arrays = {
        "dataset": repeat(context.dataset, len(records)),
        "split": repeat(context.split, len(records)),
        "query_id": pa.array([query_id for query_id, _ in records], pa.int64()),
        "gt_answers": pa.array([_get(i, "gt_answers_raw") for i in infos], pa.list_(pa.string())),
        "candidate_pool": pa.array([_known(p) for p in pools], pa.list_(pa.int32())),
    }
    for name in ("question_id", "image_id", "question"):
        kind = schema.QUERIES.field(name).type
        arrays[name] = pa.array([_get(info, name) for info in infos], kind)
    is_plain = layout.value_keys == _PLAIN and all(_is_plain(value, types) for _, value in records)
    if is_plain:
        extra = pa.nulls(len(records), pa.string())
        tokens = 2 * len(records)  # the query's id and the one key
    else:
        extras = [_query_extra(value, types, layout) for _, value in records]
        extra = pa.array([to_json(members) for members in extras], pa.string())
        tokens = sum(_count_value(value, types) for _, value in records)
    arrays["extra"] = extra
    batch = pa.RecordBatch.from_arrays(
        [arrays[f.name] for f in schema.QUERIES], schema=schema.QUERIES
    )
    return batch, max(tokens, -1)


def _is_plain(value: Made, types: Types) -> bool:
    """Whether a value holds its candidates and nothing else (seven times faster to know)."""
    return (
        value.query is UNSET
        and value.candidate_pool_indices is UNSET
        and value.rest is UNSET
        and not types.value
    )


def _query_extra(value: Made, types: Types, layout: Layout) -> dict[str, Any] | None:
    """Unknown keys of a query's value and of its ``query`` object, and its deviations."""
    members = learned_keys(value, types.value)
    inner = learned_keys(value.query, types.info) if value.query else {}
    clash = {key: inner.pop(key) for key in list(inner) if key in members}
    members = dict(sorted((members | inner).items()))  # the same text on every path
    keys, query_keys = present(value, VALUE_FIELDS), info_keys(value, types)
    note: dict[str, Any] = {}
    if (keys, query_keys) != (layout.value_keys, layout.query_keys):
        note = {"keys": keys, "query_keys": query_keys}
    if clash:
        note["query_extra"] = clash
    if note:
        members[RESERVED] = note
    return members or None


def _count_value(value: Made, types: Types) -> int:
    """String tokens of one query outside its candidates: its id, keys and strings."""
    if value.rest is not UNSET or (value.query and value.query.rest is not UNSET):
        return -(1 << 62)
    tokens = 1 + len(present(value, VALUE_FIELDS))
    tokens += count_strings(learned_keys(value, types.value))
    if value.query:
        info = {key: v for key in INFO_FIELDS if (v := getattr(value.query, key)) is not UNSET}
        tokens += count_strings(info) + count_strings(learned_keys(value.query, types.info))
    return tokens


def _get(struct: Made, name: str) -> Made:
    return None if struct is None else _known(getattr(struct, name))


def _known(value: Made) -> Made:
    return None if value is UNSET else value
