"""The tables of RL data: records to the rows of candidates and queries, column by column.

In go records, out come record batches and the string tokens of the text they account for. Rules
between fields are checked here, twice for the sake of speed: over whole columns where a block is
read at once (it is refused), record by record where the fault must be named.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import UNSET

from lever_data.sources.fields import (
    CANDIDATE_FIELDS,
    EVAL_MODES,
    INFO_FIELDS,
    POOL_FIELDS,
    RESERVED,
    VALUE_FIELDS,
    Context,
    FaultError,
    Layout,
    Record,
    RefusedError,
    Struct,
    count_strings,
    info_keys,
    present,
    repeat,
    to_json,
)
from lever_data.store import schema

_MAX_POSITION = 2**15 - 1  # pointer_pos is int16
_VERDICT = ("vqa_eval_mode", "eval_failed", "vqa_correct", "vqa_acc_score")

Columns = dict[str, Sequence[Any]]  # key in JSON → its value in every candidate, or UNSET


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
        return msgspec.to_builtins(values)  # type: ignore[no-any-return]
    if key == "vqa_eval_mode" and not EVAL_MODES.keys().isdisjoint(set(values)):
        return [EVAL_MODES.get(value, value) for value in values]
    return values


def _pointers(records: Sequence[Record], columns: Columns) -> dict[str, pa.Array]:
    """The columns pointer and pointer_pos.

    Raises:
        RefusedError: a pointer repeats an id, or its positions are not those of its ids.
    """
    pointers, positions = columns.get("pointer", ()), columns.get("pointer_pos")
    if "pointer_global" in columns or any(map(_has_positions, records)):
        try:
            pairs = [resolve_pointer(r, i) for r in records for i in _indices(r)]
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


def _indices(record: Record) -> range:
    return range(len(record.value.pointer_candidates))


def _has_positions(record: Record, index: int | None = None) -> bool:
    """Whether the pool stands there as ``candidate_pool_ids``, so that pointers are positions.

    It may stand beside each candidate, too: beside that of ``index``, else beside any.
    """
    if record.value.candidate_pool_ids not in (UNSET, None):
        return True
    return any(pool is not None for pool in _near_pools(record, index))


def _near_pools(record: Record, index: int | None) -> list[Any]:
    """The pools that stand beside a candidate, or beside all where ``index`` is ``None``."""
    if record.rest is None:
        return []
    near = record.rest.candidates if index is None else [record.rest.candidates[index]]
    return [candidate.get("candidate_pool_ids") for candidate in near]


def resolve_pointer(record: Record, index: int) -> tuple[list[int], list[int] | None]:
    """The ids of a candidate's pointer, and its positions in the pool where they are known.

    K64-fixed files hold positions in ``pointer``, beside ``pointer_global`` (the ids) and
    ``candidate_pool_ids`` (the pool).

    Raises:
        FaultError: ids, positions and pool do not agree.
    """
    candidate: Struct = record.value.pointer_candidates[index]
    given, positions = _known(candidate.pointer_global), _known(candidate.pointer_pos)
    pool = query_pool(record, index)
    if given is None and not _has_positions(record, index):
        return candidate.pointer, positions
    here = ("pointer_candidates", index)
    if positions not in (None, candidate.pointer):
        raise FaultError(
            "pointer and pointer_pos are both positions, and differ", *here, "pointer_pos"
        )
    ids = given
    if pool is not None:
        if max(candidate.pointer) >= min(len(pool), _MAX_POSITION + 1):
            what = f"a position beyond the query's pool of {len(pool)}"
            raise FaultError(what, *here, "pointer")
        ids = [pool[position] for position in candidate.pointer]
    if ids is None or given not in (None, ids):
        what = (
            f"pointer_global is not what the positions {candidate.pointer} name in the pool: {ids}"
        )
        raise FaultError(what, *here, "pointer_global")
    if len(ids) != len(candidate.pointer) or max(candidate.pointer) > _MAX_POSITION:
        raise FaultError(
            f"pointer holds positions, but not of the {len(ids)} ids", *here, "pointer"
        )
    return ids, candidate.pointer


def query_pool(record: Record, index: int | None = None) -> list[int] | None:
    """The pool of a query, under whichever name it stands; also beside a candidate."""
    pools = [_known(getattr(record.value, key)) for key in POOL_FIELDS]
    pools += _near_pools(record, index)
    found = [pool for pool in pools if pool is not None]
    if not all(isinstance(pool, list) and all(map(_is_id, pool)) for pool in found):
        raise FaultError("candidate_pool_ids is not a list of ids")
    if any(pool != found[0] for pool in found):
        raise FaultError("the query has two pools that differ")
    if found and len(set(found[0])) != len(found[0]):
        named = (key for key in POOL_FIELDS if _known(getattr(record.value, key)) is not None)
        near = ("pointer_candidates", index or 0, "candidate_pool_ids")
        key = next(named, None)
        raise FaultError("the query's pool repeats an id", *(near if key is None else (key,)))
    return found[0] if found else None


def _require_inside(
    pool: Sequence[int], pointer: Sequence[int], positions: Sequence[int] | None, *here: str | int
) -> None:
    """Refuse a pointer that names what is not in the query's pool, or not at these positions."""
    for example in pointer:
        if example not in pool:
            what = f"example {example} is not in the query's pool of {len(pool)}"
            raise FaultError(what, *here, "pointer")
    if positions is not None:
        named = [pool[at] if at < len(pool) else None for at in positions]
        if named != list(pointer):
            what = f"pointer_pos {list(positions)} names {named} in the pool, not the pointer"
            raise FaultError(what, *here, "pointer_pos")


def _pool_holds(record: Record, pool: Sequence[int]) -> bool:
    """Whether a pool holds every pointer of its query, where these name ids."""
    members = set(pool)
    if _has_positions(record):
        return True  # resolved through the pool, so inside it
    return all(
        _known(one.pointer_global) is not None
        or (
            members.issuperset(one.pointer)
            and _known(one.pointer_pos) in (None, [pool.index(i) for i in one.pointer])
        )
        for one in record.value.pointer_candidates
    )


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _require_sense(columns: Columns, rows: int) -> None:
    """Refuse a block with a score that contradicts another one of its row."""
    looked_at = [columns.get(key, [UNSET] * rows) for key in _VERDICT]
    for combination in set(zip(*looked_at, strict=True)):  # few are distinct
        if contradiction(*map(_known, combination)):
            raise RefusedError("scores that contradict each other")


def contradiction(
    mode: str | None, has_failed: bool | None, correct: int | None, accuracy: float | None
) -> str | None:
    """What contradicts among the scores of a row.

    A failed evaluation earns nothing; an official one is right exactly where its accuracy is
    above 0.
    """
    if has_failed or mode == "error":
        is_paid = correct == 1 or (accuracy or 0) > 0
        return "a failed evaluation that counts as right" if is_paid else None
    if mode not in ("file", "vqaEval") or correct is None or accuracy is None:
        return None
    if (correct == 1) == (accuracy > 0):
        return None
    return f"vqa_correct is {correct} where the official accuracy is {accuracy}"


def check_query(record: Record) -> None:
    """Rules between the fields of a query.

    Raises:
        FaultError: a repeated id, lengths that differ, a query id that is another one, scores that
            contradict each other, answers that are none.
    """
    info = record.value.query
    if info and info.query_id not in (UNSET, record.query_id):
        raise FaultError("query_id differs from the key of the query", "query", "query_id")
    if info:
        _answers(info)
    query_pool(record)
    for index, candidate in enumerate(record.value.pointer_candidates):
        here = ("pointer_candidates", index)
        pointer, positions = resolve_pointer(record, index)
        if len(set(pointer)) != len(pointer):
            raise FaultError("a pointer repeats an id", *here, "pointer")
        if positions is not None and len(positions) != len(pointer):
            what = f"pointer has {len(pointer)} ids, pointer_pos {len(positions)}"
            raise FaultError(what, *here, "pointer_pos")
        if (pool := query_pool(record, index)) is not None:
            _require_inside(pool, pointer, positions, *here)
        if fault := contradiction(*(_known(getattr(candidate, key)) for key in _VERDICT)):
            raise FaultError(fault, *here, "vqa_correct")


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
        answers = [None if info is None else _answers(info) for info in infos]
    except FaultError as fault:
        raise RefusedError(fault.what) from None
    if not all(p is None or _pool_holds(r, p) for r, p in zip(records, pools, strict=True)):
        raise RefusedError("a pool without what its pointers name")
    found = {
        key: [None if info is None else _known(getattr(info, key)) for info in infos]
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
    answers = _known(record.value.query.gt_answers_raw) if record.value.query else None
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


def _answers(info: Struct) -> list[str] | None:
    """The annotators' answers, which may be objects as in the official annotations."""
    given = _known(info.gt_answers_raw)
    if given is None:
        return None
    answers: list[str] = []
    for index, answer in enumerate(given):
        text = answer.get("answer") if isinstance(answer, dict) else answer
        if not isinstance(text, str):
            raise FaultError("an answer without a text", "query", "gt_answers_raw", index)
        answers.append(text)
    return answers


def _known(value: Struct) -> Struct:
    return None if value is UNSET else value
