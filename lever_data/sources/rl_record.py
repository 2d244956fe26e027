"""One query of RL data by itself: decoded, its rules checked, and its faults named.

In goes a value as JSON holds it, out comes a :class:`Record`, or the error that says which field is
wrong, with its byte offset. What pandas writes (0.0 for 0) is taken too. Blocks of queries are read
in ``rl.py``, over whole columns, and come here only where something is unusual or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from lever_data.readers import json_exact
from lever_data.readers.json_exact import Place
from lever_data.sources import fields
from lever_data.sources.fields import (
    POOL_FIELDS,
    RESERVED,
    FaultError,
    OnFault,
    Record,
    Rest,
    Struct,
    decode_text,
)

_VALUE = msgspec.json.Decoder(fields.Value)
_INTEGERS = ("pointer", "pointer_global", "pointer_pos", "beam_rank", "vqa_correct")
_MAX_POSITION = 2**15 - 1  # pointer_pos is int16
VERDICT = ("vqa_eval_mode", "eval_failed", "vqa_correct", "vqa_acc_score")


def read_record(
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
            return _decode(query_id, value, data, place)
        except FaultError:
            if on_fault is None or not isinstance(value, dict):
                raise
            value = _without_faults(query_id, value, data, place, on_fault)
            return _decode(query_id, value, data, place)
    except FaultError as fault:
        raise place.field_error(fault.what, data, fault.path) from None


def _without_faults(
    query_id: int, value: dict[str, Any], data: bytes, place: Place, on_fault: OnFault
) -> dict[str, Any]:
    """The value without the candidates that have a fault of their own."""
    candidates = value.get("pointer_candidates")
    kept = []
    for index, candidate in enumerate(candidates if isinstance(candidates, list) else []):
        try:
            _decode(query_id, {**value, "pointer_candidates": [candidate]}, data, place)
        except FaultError as fault:
            if fault.path[:2] == ("pointer_candidates", 0):
                path = ("pointer_candidates", index, *fault.path[2:])
                on_fault(place.field_error(fault.what, data, path))
                continue
        kept.append(candidate)
    return {**value, "pointer_candidates": kept} if isinstance(candidates, list) else value


def _decode(query_id: int, value: object, data: bytes, place: Place) -> Record:
    _take_whole_numbers(value)
    text = json_exact.encode(value, data, place)
    record = Record(query_id, decode_text(_VALUE, text, data, place))
    record = record._replace(rest=Rest.of(msgspec.json.decode(text)))
    if record.rest and record.rest.has_reserved():
        raise place.error(f"the key {RESERVED} is reserved", value=data[:40])
    check_query(record)
    return record


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
        answers_of(info)
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
        if fault := contradiction(*(or_none(getattr(candidate, key)) for key in VERDICT)):
            raise FaultError(fault, *here, "vqa_correct")


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


def resolve_pointer(record: Record, index: int) -> tuple[list[int], list[int] | None]:
    """The ids of a candidate's pointer, and its positions in the pool where they are known.

    K64-fixed files hold positions in ``pointer``, beside ``pointer_global`` (the ids) and
    ``candidate_pool_ids`` (the pool).

    Raises:
        FaultError: ids, positions and pool do not agree.
    """
    candidate: Struct = record.value.pointer_candidates[index]
    given, positions = or_none(candidate.pointer_global), or_none(candidate.pointer_pos)
    pool = query_pool(record, index)
    if given is None and not has_positions(record, index):
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


def has_positions(record: Record, index: int | None = None) -> bool:
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


def query_pool(record: Record, index: int | None = None) -> list[int] | None:
    """The pool of a query, under whichever name it stands; also beside a candidate."""
    pools = [or_none(getattr(record.value, key)) for key in POOL_FIELDS]
    pools += _near_pools(record, index)
    found = [pool for pool in pools if pool is not None]
    if not all(isinstance(pool, list) and all(map(_is_id, pool)) for pool in found):
        raise FaultError("candidate_pool_ids is not a list of ids")
    if any(pool != found[0] for pool in found):
        raise FaultError("the query has two pools that differ")
    if found and len(set(found[0])) != len(found[0]):
        named = (key for key in POOL_FIELDS if or_none(getattr(record.value, key)) is not None)
        near = ("pointer_candidates", index or 0, "candidate_pool_ids")
        key = next(named, None)
        raise FaultError("the query's pool repeats an id", *(near if key is None else (key,)))
    return found[0] if found else None


def pool_holds(record: Record, pool: Sequence[int]) -> bool:
    """Whether a pool holds every pointer of its query, where these name ids."""
    members = set(pool)
    if has_positions(record):
        return True  # resolved through the pool, so inside it
    return all(
        or_none(one.pointer_global) is not None
        or (
            members.issuperset(one.pointer)
            and or_none(one.pointer_pos) in (None, [pool.index(i) for i in one.pointer])
        )
        for one in record.value.pointer_candidates
    )


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


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


def answers_of(info: Struct) -> list[str] | None:
    """The annotators' answers, which may be objects as in the official annotations."""
    given = or_none(info.gt_answers_raw)
    if given is None:
        return None
    answers: list[str] = []
    for index, answer in enumerate(given):
        text = answer.get("answer") if isinstance(answer, dict) else answer
        if not isinstance(text, str):
            raise FaultError("an answer without a text", "query", "gt_answers_raw", index)
        answers.append(text)
    return answers


def or_none(value: Struct) -> Struct:
    """A value of a record; ``None`` where its key is absent."""
    return None if value is UNSET else value
