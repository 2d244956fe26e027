"""Rows of the store back to legacy records: names, spellings and absent keys restored.

In go rows of the candidates and queries tables as dicts, out come the values of the legacy JSON.
The inverse of ``rows.py`` and ``beam.py``: what a row does not say itself stands in
the file's layout or, where the row deviates, in its ``extra._lever``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from lever_data.sources.layout import Layout
from lever_data.sources.types import CANDIDATE_FIELDS, INFO_FIELDS, RESERVED
from lever_data.store.store import Run

Row = dict[str, Any]

_PLAIN_KEYS = (
    "pointer",
    "gen_method",
    "beam_rank",
    "beam_score",
    "logprob_score",
    "temperature",
    "vqa_pred_answer",
    "vqa_correct",
    "vqa_acc_score",
    "vqa_eval_mode",
)
_INFO_COLUMNS = {
    "query_id": "query_id",
    "question_id": "question_id",
    "image_id": "image_id",
    "question": "question",
    "gt_answers_raw": "gt_answers",
}


class Records(Protocol):
    """How the value of one query is written."""

    def value(self, query_id: int, query: Row, rows: list[Row]) -> dict[str, Any]:
        """The legacy value of a query from its row (empty: none) and its candidates."""


class BeamRecords:
    """Beam data: id lists that end with the query's id, and their scores."""

    def value(self, query_id: int, query: Row, rows: list[Row]) -> dict[str, Any]:
        """``{"id_list": …, "score_list": …}`` and the keys lever does not know."""
        return {
            "id_list": [[*row["pointer"], query_id] for row in rows],
            "score_list": [row["info_score"] for row in rows],
            **_extra(query)[0],
        }


class RlRecords:
    """RL data as it came in."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def value(self, query_id: int, query: Row, rows: list[Row]) -> dict[str, Any]:
        """The value as the source had it."""
        members, note = _extra(query)
        keys = note.get("keys", self._layout.value_keys)
        query_keys = note.get("query_keys", self._layout.query_keys)
        value: dict[str, Any] = {}
        if "query" in keys:
            clash = note.get("query_extra", {})
            value["query"] = _info(query, query_keys, members, clash)
        if "candidate_pool_indices" in keys:
            value["candidate_pool_indices"] = query["candidate_pool"]
        value["pointer_candidates"] = [self._candidate(row) for row in rows]
        return value | members

    def _candidate(self, row: Row) -> dict[str, Any]:
        members, note = _extra(row)
        keys = note.get("keys", self._layout.candidate_keys)
        record = {key: row[CANDIDATE_FIELDS[key][0]] for key in keys}
        if record.get("vqa_eval_mode") == "file":
            record["vqa_eval_mode"] = note.get("vqa_eval_mode", self._layout.file_mode)
        return record | members


class OwnRecords:
    """Runs that lever made: the plain keys always, the others where a row has them."""

    def __init__(self, write_scorer: bool) -> None:
        left_out = () if write_scorer else ("scorer",)
        self._keys = [key for key in CANDIDATE_FIELDS if key not in left_out]

    def value(self, query_id: int, query: Row, rows: list[Row]) -> dict[str, Any]:
        """A value of generation 2, or 3 where the query has text or a pool."""
        members, note = _extra(query)
        value: dict[str, Any] = {}
        known = [key for key in INFO_FIELDS if query.get(_INFO_COLUMNS[key]) is not None]
        if len(known) > 1:  # more than the query's id
            names = [key for key in ("gt_answers_norm",) if key in members]
            clash = note.get("query_extra", {})
            value["query"] = _info(query, [*known, *names], members, clash)
        if query.get("candidate_pool") is not None:
            value["candidate_pool_indices"] = query["candidate_pool"]
        value["pointer_candidates"] = [self._candidate(row) for row in rows]
        return value | members

    def _candidate(self, row: Row) -> dict[str, Any]:
        record = {}
        for key in self._keys:
            found = row[CANDIDATE_FIELDS[key][0]]
            if found is not None or key in _PLAIN_KEYS:
                record[key] = found
        return record | _extra(row)[0]


def own_layout(run: Run, scorers: Sequence[str | None]) -> tuple[Records, dict[str, Any]]:
    """Records and ``_meta`` of a run that lever made; one scorer stands in ``_meta``."""
    meta: dict[str, Any] = {
        "created_at": run.committed_at,
        "lever": {"run": run.run, "kind": run.kind, "parents": list(run.parents)},
    }
    single = len(scorers) == 1 and scorers[0] is not None
    if single:
        meta["vqa_model"] = scorers[0]
    return OwnRecords(write_scorer=not single), {"_meta": meta}


def _info(
    query: Row, keys: Sequence[str] | None, members: dict[str, Any], clash: dict[str, Any]
) -> dict[str, Any] | None:
    """The ``query`` object; its unknown keys are taken out of ``members``."""
    if keys is None:
        return None
    info: dict[str, Any] = {}
    for key in keys:
        if key in INFO_FIELDS:
            info[key] = query[_INFO_COLUMNS[key]]
        else:
            info[key] = clash[key] if key in clash else members.pop(key)
    return info


def _extra(row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    """The unknown keys of a row, and what it notes about itself."""
    text = row.get("extra")
    if text is None:
        return {}, {}
    members: dict[str, Any] = msgspec.json.decode(text)
    return members, members.pop(RESERVED, {})
