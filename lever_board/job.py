"""The process that audits, compares or picks for the board: gigabytes for a moment, then none.

In goes a folder with ``request.json``; out comes ``answer.json`` beside it, and of an audit
``queries.parquet`` and ``examples.parquet``. What it finds is what ``lever audit``, ``lever diff``
and ``lever predict`` find.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import open_session
from lever_data.report.audit import audited
from lever_data.report.diff import diff
from lever_data.report.options import AuditRequest, DiffRequest
from lever_data.store.files import write_json
from lever_data.store.store import Run, Store

# query_rewards, and of the same queries what was not scored as it should be, and what the best of
# their pools would have done. A query whose answers
# all failed is in no view for training; here it has a row without class.
_QUERIES = """
    with rewarded as (
        select * replace (dataset::varchar as dataset, split::varchar as split)
        from query_rewards
    ),

    failed as (
        select dataset, split, query_id, count(*) as num_failed
        from main.candidates
        where eval_failed
        group by all
    )

    select
        rewarded.* exclude (dataset, split, query_id, num_fallback, num_unknown),
        dataset,
        split,
        query_id,
        oracle_accuracy,
        coalesce(num_fallback, 0) as num_fallback,
        coalesce(num_failed, 0) as num_failed,
        sqrt(reward_variance) as deviation
    from rewarded
    full join failed using (dataset, split, query_id)
    left join oracles using (dataset, split, query_id)
    order by dataset, split, query_id
"""
_ORACLES = """
    select dataset, split, query_id, max(accuracy) as oracle_accuracy
    from evaluations
    where selector = 'oracle'
    group by all
"""
_EXAMPLES = """
    select
        * exclude (dataset, split),
        dataset::varchar as dataset,
        split::varchar as split,
        row_number() over (order by num_picks desc, dataset, split, example_id) as place
    from demonstration_usage
    order by place
"""


def work(folder: Path) -> None:
    """Answer the request that lies in ``folder``."""
    asked = json.loads((folder / "request.json").read_bytes())
    store = Store.open(asked["store"])
    try:
        if asked["kind"] == "audit":
            found = _audit(store, AuditRequest.model_validate_json(asked["request"]), folder)
        elif asked["kind"] == "picks":
            found = {"picks": [_picked(store, one) for one in json.loads(asked["request"])]}
        else:
            found = asdict(diff(store, DiffRequest.model_validate_json(asked["request"])))
    except LeverError as error:
        said = {name: getattr(error, name) for name in ("what", "where", "hint")}
        value = None if error.value is None else str(error.value)
        found = {"error": {**said, "value": value, "is_usage": isinstance(error, UsageError)}}
    write_json(folder / "answer.json", found)  # the last: it says that all is there


def _audit(store: Store, request: AuditRequest, folder: Path) -> dict[str, Any]:
    # a session of its own: an audit's relations are those of its view
    apart = open_session(store, runs=request.runs, only=("evaluations",)).con
    oracles = apart.sql(_ORACLES).to_arrow_table()
    with audited(store, request) as (con, found):
        con.register("oracles", oracles)
        _write(con, _QUERIES, folder / "queries.parquet")
        _write(con, _EXAMPLES, folder / "examples.parquet")
        return asdict(found)


def _picked(store: Store, asked: dict[str, Any]) -> dict[str, Any]:
    """Pointers by query id that a checkpoint picks, or why it picks none."""
    # here: an audit loads no torch
    from lever_train.evaluate.api import predict
    from lever_train.options.evaluate import EvalRequest

    request = EvalRequest.model_validate(asked["request"])
    training = store.run(asked["training"])
    try:
        if not _is_of(training, request.checkpoints[0].parent):
            return {"why_not": "the folder holds another training by now"}
        table = predict(request)
    except LeverError as error:
        return {"why_not": error.message()}
    ids, pointers = (table[name].to_pylist() for name in ("query_id", "pointer"))
    return {"pointers": dict(zip(ids, pointers, strict=True))}


def _is_of(training: Run, folder: Path) -> bool:
    """Whether the folder's metrics are those that the training committed."""
    import polars as pl

    from lever_train.learn.folder import METRICS

    own = folder / METRICS
    files = training.table_files("training_metrics")
    stored = pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files])
    return own.is_file() and pl.read_parquet(own, hive_partitioning=False).equals(stored)


def _write(con: duckdb.DuckDBPyConnection, sql: str, file: Path) -> None:
    reader = con.sql(sql).to_arrow_reader(100_000)
    with pq.ParquetWriter(file, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
