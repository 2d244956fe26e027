"""Export: a run of the store written back as legacy JSON, streamed query by query.

In goes a run of RL data or beams, out comes one JSON file that is equal, as JSON, to the source
it was ingested from (NaN is null). Runs that lever made itself (rollouts, rescored runs) become a
file of generation 2, or 3 where their queries have text or pools.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import pyarrow.parquet as pq

from lever_data.errors import LeverError, UsageError
from lever_data.sources.layout import Layout
from lever_data.sources.records import BeamRecords, Records, RlRecords, Row, own_layout
from lever_data.store.files import writing
from lever_data.store.integrity import require_intact
from lever_data.store.store import Run, Store

KINDS = ("rl_data", "beam", "rollout", "rescore")
_BATCH = 4096

Progress = Callable[[int, int], None]  # candidates written, candidates in all


@dataclass(frozen=True)
class Exported:
    """What was written."""

    run: Run
    num_queries: int
    num_candidates: int


def export(store: Store, run_id: str, out: Path, progress: Progress | None = None) -> Exported:
    """Write a run as legacy JSON to ``out``; gzip where the name ends in ``.gz``.

    The file appears under its name only when it is whole.

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
    records, top = _form(run)
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
    return Exported(run, num_queries, num_candidates)


def _check_count(run: Run, num_candidates: int) -> None:
    if num_candidates != run.rows.get("candidates", 0):
        raise LeverError(
            f"the manifest counts {run.rows.get('candidates')} candidates, "
            f"the files hold {num_candidates}",
            where=str(run.path),
            hint="`lever check` names the file that is damaged",
        )


def _form(run: Run) -> tuple[Records, dict[str, Any]]:
    """How the records of a run are written, and the ``_…`` members of the file."""
    if run.kind == "beam":
        return BeamRecords(), run.details.get("top", {})
    if "layout" not in run.details:
        return own_layout(run, _scorers(run))
    raw = run.details["layout"]
    query_keys = raw["query_keys"]
    layout = Layout(
        tuple(raw["candidate_keys"]),
        tuple(raw["value_keys"]),
        None if query_keys is None else tuple(query_keys),
        raw["file_mode"],
    )
    return RlRecords(layout), run.details.get("top", {})


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
                for batch in file.iter_batches(_BATCH, columns=names):
                    yield {
                        name: [None] * batch.num_rows
                        if column.null_count == batch.num_rows
                        else column.to_pylist()
                        for name, column in zip(batch.schema.names, batch.columns, strict=True)
                    }
        except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
            raise LeverError(
                f"a file of the run cannot be read ({error})",
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
