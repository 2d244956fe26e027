"""Export: a run of the store written back as legacy JSON, streamed query by query.

In goes a run of RL data or beams, out comes one JSON file that is equal, as JSON, to the source
it was ingested from (NaN is null): what a row does not say itself stands in the file's layout or,
where the row deviates, in its ``extra._lever``. Runs that lever made itself (rollouts, rescored
runs) become a file of generation 2, or 3 where their queries have text or pools. A file may be
written for one state of the legacy code instead, as that state reads it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import msgspec
import pyarrow.parquet as pq

from lever_data.errors import LeverError, UsageError, reason
from lever_data.older import NAMES
from lever_data.sources.fields import (
    CANDIDATE_FIELDS,
    INFO_FIELDS,
    POOL_FIELDS,
    RESERVED,
    Layout,
)
from lever_data.sources.ingest_options import Reader
from lever_data.store.files import writing
from lever_data.store.integrity import require_intact
from lever_data.store.schema import under_todays_names
from lever_data.store.store import Run, Store

KINDS = ("rl_data", "beam", "rollout", "rescore")
_BATCH = 4096

Progress = Callable[[int, int], None]  # candidates written, candidates in all


@dataclass(frozen=True)
class Export:
    """What was written."""

    run: Run
    num_queries: int
    num_candidates: int


def export(
    store: Store,
    run_id: str,
    out: Path,
    progress: Progress | None = None,
    reader: Reader | None = None,
) -> Export:
    """Write a run as legacy JSON to ``out``; gzip where the name ends in ``.gz``.

    The file appears under its name only when it is whole. ``reader`` names the state of the legacy
    code that is to read it; ``None`` gives back what was ingested.

    Raises:
        UsageError: the run is of a kind without a legacy form.
        LeverError: the file cannot be written, or the run's files do not hold what its manifest
            says.
    """
    run = store.run(run_id)
    if run.kind not in KINDS:
        raise UsageError(
            f"a run of kind {run.kind} has no legacy JSON form",
            value=run.run,
            hint=f"kinds that have: {', '.join(KINDS)}; `lever query` writes any table",
        )
    require_intact([run])
    records, top = _form(run, reader)
    num_queries = num_candidates = 0
    with _writing(out) as file:
        separator = b"{\n"
        for key, value in top.items():
            file.write(separator + _member(key, value))
            separator = b",\n"
        for query_id, query, rows in _grouped(run):
            file.write(separator + _member(str(query_id), records.value(query_id, query, rows)))
            separator = b",\n"
            num_queries += 1
            num_candidates += len(rows)
            if progress is not None:
                progress(num_candidates, run.rows.get("candidates", 0))
        file.write((b"" if separator == b",\n" else b"{") + b"\n}\n")
        _check_count(run, num_candidates)
    return Export(run, num_queries, num_candidates)


def _check_count(run: Run, num_candidates: int) -> None:
    if num_candidates != run.rows.get("candidates", 0):
        raise LeverError(
            f"the manifest counts {run.rows.get('candidates')} candidates, "
            f"the files hold {num_candidates}",
            where=str(run.path),
            hint="`lever check` names the file that is damaged",
        )


def _form(run: Run, reader: Reader | None) -> tuple[Records, dict[str, Any]]:
    """How the records of a run are written, and the ``_…`` members of the file."""
    top = (
        run.details.get("top", {}) if reader != "notes" else {}
    )  # that state takes all for queries
    if run.kind == "beam":
        return BeamRecords(), top
    if reader == "notes":
        return _NOTES, {}
    own = None if "layout" in run.details else _own_form(run, _scorers(run))
    if reader == "newest":
        return _NEWEST, own[1] if own else top
    if own:
        return own
    raw = run.details["layout"]
    query_keys = raw["query_keys"]
    layout = Layout(
        tuple(raw["candidate_keys"]),
        tuple(raw["value_keys"]),
        None if query_keys is None else tuple(query_keys),
        raw["file_mode"],
    )
    return RlRecords(layout), top


def _scorers(run: Run) -> list[str | None]:
    found: set[str | None] = set()
    for batch in _batches(run, "candidates", ["scorer"]):
        found.update(batch["scorer"])
    return sorted(found, key=str)


def _grouped(run: Run) -> Iterator[tuple[int, Row, list[Row]]]:
    """(query id, its row of the queries table, its candidates) in the order of query ids."""
    queries = _rows(run, "queries")
    groups = _candidate_groups(run)
    query, group = next(queries, None), next(groups, None)
    while query is not None or group is not None:
        if group is None or (query is not None and query["query_id"] <= group[0]):
            assert query is not None
            matches = group is not None and query["query_id"] == group[0]
            rows = group[1] if group is not None and matches else []
            yield query["query_id"], query, rows
            query = next(queries, None)
            group = next(groups, None) if matches else group
        else:
            yield group[0], {}, group[1]
            group = next(groups, None)


def _candidate_groups(run: Run) -> Iterator[tuple[int, list[Row]]]:
    rows: list[Row] = []
    for row in _rows(run, "candidates"):
        if rows and rows[0]["query_id"] != row["query_id"]:
            yield rows[0]["query_id"], rows
            rows = []
        rows.append(row)
    if rows:
        yield rows[0]["query_id"], rows


def _rows(run: Run, table: str) -> Iterator[Row]:
    for columns in _batches(run, table, None):
        names = list(columns)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _batches(run: Run, table: str, names: list[str] | None) -> Iterator[dict[str, list[Any]]]:
    """Batches of a table as Python columns; a column that is null throughout costs little."""
    for path in run.table_files(table):
        try:
            with pq.ParquetFile(path) as file:
                for batch in map(under_todays_names, file.iter_batches(_BATCH, columns=names)):
                    yield {
                        name: [None] * batch.num_rows
                        if column.null_count == batch.num_rows
                        else column.to_pylist()
                        for name, column in zip(batch.schema.names, batch.columns, strict=True)
                    }
        except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
            raise LeverError(
                f"a file of the run cannot be read ({reason(error)})",
                where=str(path),
                hint="`lever check` verifies every file of the store",
            ) from error


@contextmanager
def _writing(out: Path) -> Iterator[IO[bytes]]:
    with writing(out) as raw:
        if out.suffix != ".gz":
            yield raw
            return
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
            yield cast(IO[bytes], packed)


def _member(key: str, value: object) -> bytes:
    return msgspec.json.encode(key) + b": " + msgspec.json.encode(value)


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
    """RL data as it came in: what a row does not say itself stands in the layout of its file."""

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
            if "gt_answers_raw" in note:
                value["query"]["gt_answers_raw"] = note["gt_answers_raw"]
        value |= {key: query["candidate_pool"] for key in POOL_FIELDS if key in keys}
        has_positions = value.get("candidate_pool_ids") is not None
        value["pointer_candidates"] = [self._candidate(row, has_positions) for row in rows]
        return value | members

    def _candidate(self, row: Row, has_positions: bool) -> dict[str, Any]:
        members, note = _extra(row)
        keys = note.get("keys", self._layout.candidate_keys)
        record = {key: _stored(row, key) for key in keys}
        if has_positions or "pointer_global" in keys or "candidate_pool_ids" in members:
            record["pointer"] = row["pointer_pos"]
        if "vqa_eval_mode" in keys:
            mode = self._layout.spelled(record["vqa_eval_mode"])
            record["vqa_eval_mode"] = note.get("vqa_eval_mode", mode)
        if "eval_failed" in note:
            record["eval_failed"] = note["eval_failed"]
        return record | members


def _stored(row: Row, key: str) -> Any:
    """What a row holds for a legacy key, in legacy keys throughout."""
    found = row[CANDIDATE_FIELDS[key][0]]
    if key != "shot_scores" or found is None:
        return found
    return [{_KEYS.get(name, name): value for name, value in one.items()} for one in found]


_KEYS = {name: older for older, name in NAMES.items()}


class PlainRecords:
    """Pointers as ids; the plain keys always, the others where a row has them.

    Args:
        left_out: keys that are not written.
        failed: how the evaluation of a failed row is written; ``None``: as the row has it.
    """

    def __init__(
        self, left_out: Collection[str] = (), failed: dict[str, Any] | None = None
    ) -> None:
        left_out = {"pointer_global", *left_out}
        self._keys = [key for key in CANDIDATE_FIELDS if key not in left_out]
        self._failed = failed or {}

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
            found = _stored(row, key)
            if found is not None or key in _PLAIN_KEYS:
                record[key] = found
        members, _ = _extra(row)
        members.pop("candidate_pool_ids", None)  # beside it `pointer` would be a position
        return record | members | (self._failed if row["eval_failed"] else {})


# What each state of the legacy code reads beside plain keys: that of the notes knows no mode
# `error`, the newest skips it; the newest takes `pointer_pos` for ids.
_NOTES = PlainRecords(
    ["pointer_pos"],
    {
        "vqa_pred_answer": "",
        "vqa_correct": 0,
        "vqa_acc_score": 0.0,
        "vqa_eval_mode": "fallback",
    },
)
_NEWEST = PlainRecords(["pointer_pos"], {"vqa_eval_mode": "error"})


def _own_form(run: Run, scorers: Sequence[str | None]) -> tuple[Records, dict[str, Any]]:
    """Records and ``_meta`` of a run that lever made; one scorer stands in ``_meta``."""
    meta: dict[str, Any] = {
        "created_at": run.committed_at,
        "lever": {"run": run.run, "kind": run.kind, "parents": list(run.parents)},
    }
    single = len(scorers) == 1 and scorers[0] is not None
    if single:
        meta["vqa_model"] = scorers[0]
    return PlainRecords(["scorer"] if single else []), {"_meta": meta}


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
