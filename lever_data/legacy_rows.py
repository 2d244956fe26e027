"""Turn decoded RL records into Arrow batches of the candidates and queries tables.

In go (query id, value) pairs as the types of ``legacy_types.py`` decode them; out come two record
batches and the number of string tokens they account for. That number is a proof: where it equals
the number of string tokens in the text, no member of any object was dropped (a decoder keeps only
the last of two equal keys, silently).

Columns cannot say whether a key was absent or null, nor how an eval mode was spelled. What most
records of a file have in common stands once in its :class:`Layout`; a row that deviates says so
under ``extra._lever``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import UNSET

from lever_data import schema
from lever_data.legacy_types import (
    CANDIDATE_FIELDS,
    INFO_FIELDS,
    RESERVED,
    VALUE_FIELDS,
    Made,
    Types,
)

Record = tuple[int, Any]  # query id, Value


class RefusedError(Exception):
    """The fast path does not take this text; the careful path says whether it is wrong."""


@dataclass(frozen=True)
class Layout:
    """What the records of one file have in common; stands in the manifest's details.

    Attributes:
        candidate_keys: known keys of a candidate.
        value_keys: known keys of a query's value.
        query_keys: all keys of its ``query`` object; ``None`` where it has none.
        file_mode: how eval mode ``file`` is written: ``file`` or ``vqaEval``.
    """

    candidate_keys: tuple[str, ...]
    value_keys: tuple[str, ...]
    query_keys: tuple[str, ...] | None
    file_mode: str


@dataclass(frozen=True)
class Context:
    """What every row of a file shares; ``scorer`` is ``_meta.vqa_model`` where there is one."""

    dataset: str
    split: str
    scorer: str | None


@dataclass(frozen=True)
class Built:
    """Two record batches of one block, and the string tokens of the text they account for.

    ``tokens`` is -1 where records carry keys outside the types, as those of the careful path may.
    """

    candidates: pa.RecordBatch
    queries: pa.RecordBatch
    tokens: int


def find_layout(records: Iterable[Record], types: Types) -> Layout:
    """The layout of a file, taken from its first query that has a candidate."""
    layout = Layout((), ("pointer_candidates",), None, "file")
    for _, value in records:
        layout = Layout((), _present(value, VALUE_FIELDS), _info_keys(value, types), "file")
        for candidate in value.pointer_candidates[:1]:
            return Layout(
                _present(candidate, CANDIDATE_FIELDS),
                layout.value_keys,
                layout.query_keys,
                "vqaEval" if candidate.vqa_eval_mode == "vqaEval" else "file",
            )
    return layout


def build(records: Sequence[Record], types: Types, layout: Layout, context: Context) -> Built:
    """Record batches of ``records``, in their order.

    Raises:
        RefusedError: a pointer repeats an id, pointer and pointer_pos differ in length, or a
            query's id is not its key.
    """
    candidates, tokens = _candidate_batch(records, types, layout, context)
    queries, more = _query_batch(records, types, layout, context)
    return Built(candidates, queries, -1 if tokens < 0 or more < 0 else tokens + more)


def _candidate_batch(
    records: Sequence[Record], types: Types, layout: Layout, context: Context
) -> tuple[pa.RecordBatch, int]:
    structs = list(chain.from_iterable(value.pointer_candidates for _, value in records))
    counts = np.array([len(value.pointer_candidates) for _, value in records], dtype=np.int64)
    names = [*CANDIDATE_FIELDS, *types.candidate, RESERVED]
    rows = list(map(msgspec.structs.astuple, structs))
    columns = dict(zip(names, zip(*rows, strict=True), strict=bool(rows)))
    made = _Columns(columns, len(structs), layout)
    arrays = {column: made.array(name) for name, (column, _) in CANDIDATE_FIELDS.items()}
    _check_pointers(arrays["pointer"], arrays["pointer_pos"])
    if "scorer" in made.mixed or "scorer" not in made.columns:
        arrays["scorer"] = _fill_scorer(made, context.scorer)
    arrays["extra"] = made.extra(types.candidate)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.array([query_id for query_id, _ in records], dtype=np.int64)
    arrays |= {
        "dataset": pa.repeat(context.dataset, len(structs)),
        "split": pa.repeat(context.split, len(structs)),
        "query_id": pa.array(np.repeat(ids, counts)),
        "candidate": pa.array((np.arange(len(structs)) - starts).astype(np.int32)),
        "shot_num": pc.list_value_length(arrays["pointer"]).cast(pa.int8()),
    }
    batch = pa.RecordBatch.from_arrays(
        [arrays[f.name] for f in schema.CANDIDATES], schema=schema.CANDIDATES
    )
    return batch, -1 if RESERVED in made.columns else made.tokens


class _Columns:
    """The columns of a block of candidates: which keys are absent, and Arrow arrays of them."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], num_rows: int, layout: Layout) -> None:
        self.num_rows = num_rows
        self.layout = layout
        self.tokens = 0
        self.columns: dict[str, Sequence[Any]] = {}
        self.mixed: set[str] = set()  # keys that some rows have and others do not
        self.modes: Sequence[Any] = ()
        for name, values in columns.items():
            unset = values.count(UNSET)
            if unset < num_rows:
                self.columns[name] = values
                self.tokens += num_rows - unset
                if unset:
                    self.mixed.add(name)

    def array(self, name: str) -> pa.Array:
        """The column of one known key; what is absent is null."""
        kind = schema.CANDIDATES.field(CANDIDATE_FIELDS[name][0]).type
        if name not in self.columns:
            return pa.nulls(self.num_rows, kind)
        values = self.columns[name]
        if name in self.mixed:
            values = [None if value is UNSET else value for value in values]
        if pa.types.is_list(kind):
            return self._list_array(values, kind)
        array = pa.array(values, kind)
        if pa.types.is_string(kind):
            self.tokens += self.num_rows - array.null_count
        if name == "vqa_eval_mode":
            self.modes = values
            array = pc.if_else(pc.equal(array, "vqaEval"), "file", array)
        return array

    def _list_array(self, values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        if pa.types.is_struct(kind.value_type):
            plain = msgspec.to_builtins(values)
            self.tokens += count_strings(plain)
            return pa.array(plain, kind)
        if None in values:
            return pa.array(values, kind)
        offsets = np.zeros(len(values) + 1, dtype=np.int32)
        np.cumsum(np.fromiter(map(len, values), np.int32, len(values)), out=offsets[1:])
        flat = pa.array(list(chain.from_iterable(values)), kind.value_type)
        return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)

    def extra(self, learned: Sequence[str]) -> pa.Array:
        """Unknown keys as one JSON object a row, with what export needs besides."""
        unknown = [name for name in (*learned, RESERVED) if name in self.columns]
        notes = self._notes()
        if not unknown:
            return (
                pa.array([to_json(note) for note in notes], pa.string())
                if notes
                else (pa.nulls(self.num_rows, pa.string()))
            )
        texts: list[str | None] = []
        for row, values in enumerate(zip(*(self.columns[n] for n in unknown), strict=True)):
            members = {n: v for n, v in zip(unknown, values, strict=True) if v is not UNSET}
            members |= members.pop(RESERVED, {})
            self.tokens += sum(map(count_strings, members.values()))
            if notes and notes[row]:
                members |= notes[row] or {}
            texts.append(to_json(members or None))
        return pa.array(texts, pa.string())

    def _notes(self) -> list[dict[str, Any] | None]:
        """Per row, how it deviates from the layout; empty where no row does."""
        known = [name for name in CANDIDATE_FIELDS if name in self.columns]
        mixed = [name for name in known if name in self.mixed]
        other = "file" if self.layout.file_mode == "vqaEval" else "vqaEval"
        respelled = other in self.modes
        if not mixed and not respelled and tuple(known) == self.layout.candidate_keys:
            return []
        modes = self.modes if respelled else [None] * self.num_rows
        present = (
            zip(*(self.columns[name] for name in mixed), strict=True)
            if mixed
            else (() for _ in range(self.num_rows))
        )
        cache: dict[Any, dict[str, Any] | None] = {}
        notes = []
        for values, mode in zip(present, modes, strict=True):
            absent = tuple(n for n, v in zip(mixed, values, strict=True) if v is UNSET)
            key = (absent, mode == other)
            if key not in cache:
                keys = tuple(name for name in known if name not in absent)
                cache[key] = self._note(keys, other if mode == other else None)
            notes.append(cache[key])
        return notes

    def _note(self, keys: tuple[str, ...], mode: str | None) -> dict[str, Any] | None:
        note: dict[str, Any] = {}
        if keys != self.layout.candidate_keys:
            note["keys"] = list(keys)
        if mode is not None:
            note["vqa_eval_mode"] = mode
        return {RESERVED: note} if note else None


def _fill_scorer(made: _Columns, scorer: str | None) -> pa.Array:
    """The scorer of rows that do not name one is the file's."""
    if scorer is None and "scorer" not in made.columns:
        return pa.nulls(made.num_rows, pa.string())
    if "scorer" not in made.columns:
        return pa.repeat(pa.scalar(scorer, pa.string()), made.num_rows)
    values = [scorer if value is UNSET else value for value in made.columns["scorer"]]
    return pa.array(values, pa.string())


def _check_pointers(pointer: pa.Array, pointer_pos: pa.Array) -> None:
    lengths = np.diff(pointer.offsets.to_numpy())
    keys = np.repeat(np.arange(len(lengths), dtype=np.int64) << 32, lengths)
    keys |= pointer.values.to_numpy()
    keys.sort()
    if (keys[1:] == keys[:-1]).any():
        raise RefusedError("a pointer repeats an id")
    if pointer_pos.null_count < len(pointer_pos):
        same = pc.equal(pc.list_value_length(pointer_pos), pc.list_value_length(pointer))
        if pc.all(same).as_py() is False:
            raise RefusedError("pointer and pointer_pos differ in length")


def _query_batch(
    records: Sequence[Record], types: Types, layout: Layout, context: Context
) -> tuple[pa.RecordBatch, int]:
    infos = [value.query if value.query else None for _, value in records]
    for (query_id, _), info in zip(records, infos, strict=True):
        if info is not None and info.query_id not in (UNSET, query_id):
            raise RefusedError("a query_id differs from its key")
    pools = [value.candidate_pool_indices for _, value in records]
    arrays = {
        "dataset": pa.repeat(context.dataset, len(records)),
        "split": pa.repeat(context.split, len(records)),
        "query_id": pa.array([query_id for query_id, _ in records], pa.int64()),
        "gt_answers": pa.array([_get(i, "gt_answers_raw") for i in infos], pa.list_(pa.string())),
        "candidate_pool": pa.array([_known(p) for p in pools], pa.list_(pa.int32())),
    }
    for name in ("question_id", "image_id", "question"):
        kind = schema.QUERIES.field(name).type
        arrays[name] = pa.array([_get(info, name) for info in infos], kind)
    extras = [_query_extra(value, types, layout) for _, value in records]
    arrays["extra"] = pa.array([to_json(extra) for extra in extras], pa.string())
    batch = pa.RecordBatch.from_arrays(
        [arrays[f.name] for f in schema.QUERIES], schema=schema.QUERIES
    )
    return batch, sum(_count_value(value, types) for _, value in records)


def _query_extra(value: Made, types: Types, layout: Layout) -> dict[str, Any] | None:
    """Unknown keys of a query's value and of its ``query`` object, and its deviations."""
    members = _learned(value, types.value)
    inner = _learned(value.query, types.info) if value.query else {}
    clash = {key: inner.pop(key) for key in list(inner) if key in members}
    members |= inner
    keys, query_keys = _present(value, VALUE_FIELDS), _info_keys(value, types)
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
    tokens = 1 + len(_present(value, VALUE_FIELDS))
    tokens += count_strings(_learned(value, types.value))
    if value.query:
        info = {key: v for key in INFO_FIELDS if (v := getattr(value.query, key)) is not UNSET}
        tokens += count_strings(info) + count_strings(_learned(value.query, types.info))
    return tokens


def count_strings(value: object) -> int:
    """Strings in a JSON value, keys included."""
    if isinstance(value, str):
        return 1
    if isinstance(value, list | tuple):
        return sum(map(count_strings, value))
    if isinstance(value, dict):
        return len(value) + sum(map(count_strings, value.values()))
    return 0


def to_json(value: object) -> str | None:
    """Compact JSON text; ``None`` for nothing."""
    return None if value is None else msgspec.json.encode(value).decode()


def _present(struct: Made, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if getattr(struct, name) is not UNSET)


def _learned(struct: Made, names: Sequence[str]) -> dict[str, Any]:
    found = {name: getattr(struct, f"extra{i}") for i, name in enumerate(names)}
    known = {name: value for name, value in found.items() if value is not UNSET}
    return known if struct.rest is UNSET else known | struct.rest


def _info_keys(value: Made, types: Types) -> tuple[str, ...] | None:
    if not value.query:
        return None
    return (*_present(value.query, INFO_FIELDS), *sorted(_learned(value.query, types.info)))


def _get(struct: Made, name: str) -> Made:
    return None if struct is None else _known(getattr(struct, name))


def _known(value: Made) -> Made:
    return None if value is UNSET else value
