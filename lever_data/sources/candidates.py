"""The candidates table of RL data: one row per candidate, column by column.

In go (query id, value) records; out come a record batch and the string tokens it accounts for.
All fields of all structs are taken out in one go, which is as fast as their types are narrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import UNSET

from lever_data.sources.layout import (
    Context,
    Layout,
    Record,
    RefusedError,
    count_strings,
    repeat,
    to_json,
)
from lever_data.sources.types import CANDIDATE_FIELDS, RESERVED, REST, Made, Types
from lever_data.store import schema


def candidate_batch(
    records: Sequence[Record], types: Types, layout: Layout, context: Context, all_keys: bool
) -> tuple[pa.RecordBatch, int]:
    """The candidates of ``records`` in their order; see ``rows.build``."""
    structs = list(chain.from_iterable(value.pointer_candidates for _, value in records))
    counts = np.array([len(value.pointer_candidates) for _, value in records], dtype=np.int64)
    made = _Columns(_taken_apart(structs, types, all_keys), len(structs), layout)
    arrays = {column: made.array(name) for name, (column, _) in CANDIDATE_FIELDS.items()}
    _check_pointers(arrays["pointer"], arrays["pointer_pos"])
    if "scorer" in made.mixed or "scorer" not in made.columns:
        arrays["scorer"] = _fill_scorer(made, context.scorer)
    arrays["extra"] = made.extra(types.candidate)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.array([query_id for query_id, _ in records], dtype=np.int64)
    arrays |= {
        "dataset": repeat(context.dataset, len(structs)),
        "split": repeat(context.split, len(structs)),
        "query_id": pa.array(np.repeat(ids, counts)),
        "candidate": pa.array((np.arange(len(structs)) - starts).astype(np.int32)),
        "shot_num": pa.array(_lengths(arrays["pointer"]).astype(np.int8)),
    }
    batch = pa.RecordBatch.from_arrays(
        [arrays[f.name] for f in schema.CANDIDATES], schema=schema.CANDIDATES
    )
    return batch, -1 if RESERVED in made.columns else made.tokens


def _taken_apart(structs: list[Made], types: Types, all_keys: bool) -> dict[str, tuple[Any, ...]]:
    """Key in JSON → its value in every struct, of the keys that the first, or any, struct has."""
    if not structs:
        return {}
    names = {f"extra{i}": name for i, name in enumerate(types.candidate)} | {REST: RESERVED}
    fields = structs[0].__struct_fields__
    columns = zip(*map(msgspec.structs.astuple, structs), strict=True)
    return {
        names.get(field, field): values
        for field, values in zip(fields, columns, strict=True)
        if values[0] is not UNSET or (all_keys and values.count(UNSET) < len(values))
    }


class _Columns:
    """The columns of a block of candidates: which keys are absent, and Arrow arrays of them."""

    def __init__(self, columns: dict[str, tuple[Any, ...]], num_rows: int, layout: Layout) -> None:
        self.columns = columns
        self.num_rows = num_rows
        self.layout = layout
        self.tokens = 0
        self.mixed: set[str] = set()  # known keys that some rows have and others do not

    def array(self, name: str) -> pa.Array:
        """The column of one known key; what is absent is null."""
        kind = schema.CANDIDATES.field(CANDIDATE_FIELDS[name][0]).type
        values: Sequence[Any] | None = self.columns.get(name)
        if values is None:
            return pa.nulls(self.num_rows, kind)
        if name == "vqa_eval_mode" and "vqaEval" in values:
            values = ["file" if value == "vqaEval" else value for value in values]
        try:
            array = self._convert(values, kind)
        except (TypeError, pa.ArrowInvalid):  # what Arrow says to an UNSET
            self.tokens -= values.count(UNSET)
            self.mixed.add(name)
            array = self._convert([None if v is UNSET else v for v in values], kind)
        self.tokens += self.num_rows
        if pa.types.is_string(kind):
            self.tokens += self.num_rows - array.null_count
        return array

    def _convert(self, values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
            plain = msgspec.to_builtins(values)
            array = pa.array(plain, kind)
            self.tokens += count_strings(plain)
            return array
        return pa.array(values, kind)

    def extra(self, learned: Sequence[str]) -> pa.Array:
        """Unknown keys as one JSON object a row, with what export needs besides."""
        unknown = [name for name in (*learned, RESERVED) if name in self.columns]
        notes = self._notes()
        if not unknown and not notes:
            return pa.nulls(self.num_rows, pa.string())
        if not unknown:
            return pa.array([to_json(note) for note in notes], pa.string())
        texts: list[str | None] = []
        for row, values in enumerate(zip(*(self.columns[n] for n in unknown), strict=True)):
            members = {n: v for n, v in zip(unknown, values, strict=True) if v is not UNSET}
            members |= members.pop(RESERVED, {})
            self.tokens += count_strings(members)
            members = dict(sorted(members.items()))  # the same text on every path
            if notes:
                members |= notes[row] or {}
            texts.append(to_json(members or None))
        return pa.array(texts, pa.string())

    def _notes(self) -> list[dict[str, Any] | None]:
        """Per row, how it deviates from the layout; empty where no row does."""
        known = [name for name in CANDIDATE_FIELDS if name in self.columns]
        mixed = [name for name in known if name in self.mixed]
        other = "file" if self.layout.file_mode == "vqaEval" else "vqaEval"
        modes: Sequence[Any] = self.columns.get("vqa_eval_mode", ())
        if other not in modes:
            modes = [None] * self.num_rows
            if not mixed and tuple(known) == self.layout.candidate_keys:
                return []
        cache: dict[Any, dict[str, Any] | None] = {}
        notes = []
        for values, mode in zip(self._of(mixed), modes, strict=True):
            absent = tuple(n for n, v in zip(mixed, values, strict=True) if v is UNSET)
            key = (absent, mode == other)
            if key not in cache:
                keys = tuple(name for name in known if name not in absent)
                cache[key] = self._note(keys, other if mode == other else None)
            notes.append(cache[key])
        return notes

    def _of(self, names: list[str]) -> Iterator[tuple[Any, ...]]:
        """The rows of some columns."""
        if not names:
            return iter([()] * self.num_rows)
        return zip(*(self.columns[name] for name in names), strict=True)

    def _note(self, keys: tuple[str, ...], mode: str | None) -> dict[str, Any] | None:
        note: dict[str, Any] = {}
        if keys != self.layout.candidate_keys:
            note["keys"] = list(keys)
        if mode is not None:
            note["vqa_eval_mode"] = mode
        return {RESERVED: note} if note else None


def _fill_scorer(made: _Columns, scorer: str | None) -> pa.Array:
    """The scorer of rows that do not name one is the file's."""
    if "scorer" not in made.columns:
        return repeat(scorer, made.num_rows)
    values = [scorer if value is UNSET else value for value in made.columns["scorer"]]
    return pa.array(values, pa.string())


def _lengths(lists: pa.ListArray) -> np.ndarray:
    """Elements of every list, int32; 0 for null."""
    return np.diff(lists.offsets.to_numpy())


def _check_pointers(pointer: pa.Array, pointer_pos: pa.Array) -> None:
    lengths = _lengths(pointer)
    keys = np.repeat(np.arange(len(lengths), dtype=np.int64) << 32, lengths)
    keys |= pointer.values.to_numpy()
    keys.sort()
    if (keys[1:] == keys[:-1]).any():
        raise RefusedError("a pointer repeats an id")
    if pointer_pos.null_count < len(pointer_pos):
        differs = lengths != _lengths(pointer_pos)
        if differs[pointer_pos.is_valid().to_numpy(zero_copy_only=False)].any():
            raise RefusedError("pointer and pointer_pos differ in length")
