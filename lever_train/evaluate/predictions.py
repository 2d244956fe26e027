"""Write picked demonstrations as JSON lines or Parquet, and what they were made from beside them.

In goes the table of ``predict``; out come files that are whole or not there: the picks, and
``<name>.provenance.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import UsageError
from lever_data.store.files import write_json, writing

PROVENANCE = "lever"  # key of the schema's metadata
JSON_LINES = (".jsonl", ".json", ".ndjson")


def write_picks(picks: pa.Table, path: Path) -> None:
    """Write the table; the ending of the name says in which format.

    Raises:
        UsageError: an ending that means neither.
    """
    if path.suffix in JSON_LINES:
        lines = (json.dumps(row, ensure_ascii=False) for row in picks.to_pylist())
        with writing(path) as file:
            file.writelines(f"{line}\n".encode() for line in lines)
        _write_provenance(picks, path)
        return
    if path.suffix != ".parquet":
        raise UsageError(
            "the name says neither JSON lines nor Parquet",
            value=str(path),
            hint="--out picks.jsonl or --out picks.parquet",
        )
    sink = pa.BufferOutputStream()
    pq.write_table(picks, sink, compression="zstd")
    with writing(path) as file:
        file.write(sink.getvalue())
    _write_provenance(picks, path)


def _write_provenance(picks: pa.Table, path: Path) -> None:
    provenance = json.loads(picks.schema.metadata[PROVENANCE.encode()])
    write_json(path.with_name(f"{path.name}.provenance.json"), provenance)
