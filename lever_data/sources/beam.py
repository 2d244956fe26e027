"""The beam (InfoScore) format: id lists with a score each, best first, to Arrow batches.

In goes ``{"<qid>": {"id_list": [[i1, …, iS, qid], …], "score_list": […]}}``; out come rows of the
candidates table: the last id of every list is the query itself and is left off, ``info_score`` is
the score, ``candidate`` and ``beam_rank`` are the position in the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from lever_data.readers import json_exact
from lever_data.readers.json_exact import Place
from lever_data.sources.decode import count_tokens
from lever_data.sources.fields import (
    RESERVED,
    Batches,
    BeamValue,
    Context,
    FaultError,
    OnFault,
    Record,
    RefusedError,
    decode_text,
    repeat,
    to_json,
)
from lever_data.sources.rl import decode_object
from lever_data.store import schema

_KNOWN = ("id_list", "score_list")


class BeamFormat:
    """Beam data of one file."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._blocks = msgspec.json.Decoder(dict[int, BeamValue])
        self._values = msgspec.json.Decoder(BeamValue)
        self._extra: dict[int, dict[str, Any]] = {}  # unknown keys by query, until they are built

    def read_block(self, text: bytes) -> Batches:
        """The queries of an object's text; RefusedError where something is unusual or wrong."""
        records = decode_object(self._blocks, text)
        try:
            for record in records:
                _check(record)
        except FaultError as fault:
            raise RefusedError(fault.what) from None
        if count_tokens(text) != 3 * len(records):  # of each query its id and the two keys
            raise RefusedError("a key occurs twice in one object")
        return self.build(records)

    def read_value(
        self,
        query_id: int,
        value: object,
        data: bytes,
        place: Place,
        on_fault: OnFault | None = None,
    ) -> Record:
        """One query's beams; a query with a fault is left out whole, so ``on_fault`` is not told.

        Raises:
            LeverError: wrong types, lists of different lengths, a list that does not end with
                the query's id, a repeated id: with field and offset.
        """
        known = value
        if isinstance(value, dict):
            known = {key: value[key] for key in _KNOWN if key in value}
            unknown = {key: v for key, v in value.items() if key not in _KNOWN}
            if RESERVED in unknown:
                raise place.error(f"the key {RESERVED} is reserved")
            if unknown:
                self._extra[query_id] = unknown
        try:
            text = json_exact.encode(known, data, place)
            record = Record(query_id, decode_text(self._values, text, data, place))
            _check(record)
        except FaultError as fault:
            raise place.field_error(fault.what, data, fault.path) from None
        return record

    def build(self, records: Sequence[Record]) -> Batches:
        """Record batches: a row per beam, and a row per query for what belongs to the query."""
        values = [record.value for record in records]
        counts = np.array([len(value.id_list) for value in values], dtype=np.int64)
        total = int(counts.sum())
        ids = np.array([record.query_id for record in records], dtype=np.int64)
        lists = [beam[:-1] for value in values for beam in value.id_list]
        ranks = (np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)
        arrays = {
            "query_id": pa.array(np.repeat(ids, counts)),
            "candidate": pa.array(ranks),
            "beam_rank": pa.array(ranks),
            "shot_num": pa.array([len(pointer) for pointer in lists], pa.int8()),
            "pointer": pa.array(lists, pa.list_(pa.int32())),
            "gen_method": repeat("beam", total),
            "info_score": pa.array(
                list(chain.from_iterable(value.score_list for value in values)), pa.float64()
            ),
        }
        extras = [to_json(self._extra.pop(record.query_id, None)) for record in records]
        queries = {"query_id": pa.array(ids), "extra": pa.array(extras, pa.string())}
        return Batches(
            _batch(arrays, schema.CANDIDATES, total, self.context),
            _batch(queries, schema.QUERIES, len(records), self.context),
            3 * len(records),
        )


def _batch(
    arrays: dict[str, pa.Array], table: pa.Schema, rows: int, context: Context
) -> pa.RecordBatch:
    arrays |= {
        "dataset": repeat(context.dataset, rows),
        "split": repeat(context.split, rows),
    }
    columns = [arrays.get(f.name, pa.nulls(rows, f.type)) for f in table]
    return pa.RecordBatch.from_arrays(columns, schema=table)


def _check(record: Record) -> None:
    """Rules between the fields of a query's beams.

    Raises:
        FaultError: one is broken.
    """
    value: BeamValue = record.value
    if len(value.id_list) != len(value.score_list):
        what = f"id_list has {len(value.id_list)} entries, score_list {len(value.score_list)}"
        raise FaultError(what, "score_list")
    for index, beam in enumerate(value.id_list):
        here = ("id_list", index)
        if not beam or beam[-1] != record.query_id:
            raise FaultError("a beam must end with the id of its query", *here)
        if not 2 <= len(beam) <= 128:
            raise FaultError("a beam must hold 1 to 127 demonstrations", *here)
        if len(set(beam[:-1])) != len(beam) - 1:
            raise FaultError("a beam repeats an id", *here)
