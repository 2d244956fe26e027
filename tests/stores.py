"""Small stores for tests: rows given as dicts, missing columns null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lever_data.store.schema import CANDIDATES, EXAMPLES, QUERIES
from lever_data.store.store import Run, RunSpec, Store

Row = Mapping[str, Any]


def candidate(
    query_id: int, ordinal: int, pointer: Sequence[int], **columns: Any
) -> dict[str, Any]:
    """A candidates row of dataset `d`, split `train`."""
    return {
        "dataset": "d",
        "split": "train",
        "query_id": query_id,
        "candidate": ordinal,
        "shot_num": len(pointer),
        "pointer": list(pointer),
        "gen_method": "beam",
        **columns,
    }


def table(schema: pa.Schema, rows: Sequence[Row]) -> pa.Table:
    unknown = {name for row in rows for name in row} - {f.name for f in schema}
    assert not unknown, f"no columns of the table: {unknown}"
    return pa.Table.from_pylist([{f.name: row.get(f.name) for f in schema} for row in rows], schema)


def commit(
    store: Store,
    rows: Sequence[Row],
    *,
    kind: str = "rl_data",
    name: str = "a",
    question_ids: Mapping[int, int] | None = None,
    **spec: Any,
) -> Run:
    """Commit candidates (and their queries) as one run; ``name`` tells its source apart."""
    known = question_ids or {}
    queries = [
        {"dataset": "d", "split": "train", "query_id": q, "question_id": known.get(q)}
        for q in sorted({row["query_id"] for row in rows})
    ]
    run = RunSpec(kind=kind, dataset="d", split="train", source_sha256=name, **spec)
    with store.begin(run) as writer:
        writer.write("candidates", table(CANDIDATES, rows))
        writer.write("queries", table(QUERIES, queries))
        return writer.commit()


def commit_examples(store: Store, rows: Sequence[Row], name: str = "x") -> Run:
    run = RunSpec(kind="examples", dataset="d", split="train", source_sha256=name)
    with store.begin(run) as writer:
        writer.write("examples", table(EXAMPLES, rows))
        return writer.commit()


def new_store(path: Path) -> Store:
    return Store.create(path / "store")
