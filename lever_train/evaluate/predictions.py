"""Write what was predicted: picked demonstrations, and answers as official results files.

In goes the table of ``predict``; out come files that are whole or not there: the picks as JSON
lines or Parquet, and ``<name>.provenance.json``. Or in go the outcomes of an evaluation; out comes
a results file ``[{"question_id": …, "answer": …}]`` for each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lever_data.errors import UsageError
from lever_data.items.prompts import Id
from lever_data.store.files import write_json, writing
from lever_train.evaluate.evaluate import Outcome

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


def write_results(
    outcomes: Sequence[Outcome], question_ids: Sequence[Id | None], folder: Path
) -> list[Path]:
    """Write ``<selector>_shot<k>.json`` of every outcome, in the format of the official servers.

    A question whose answer failed is left out: an empty answer would be scored as a wrong one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for one in outcomes:
        answered = zip(question_ids, one.predictions, strict=True)
        found = [{"question_id": q, "answer": text} for q, text in answered if text is not None]
        name = re.sub(r"[^\w.+-]", "_", one.selector)
        paths.append(folder / f"{name}_shot{one.shots}.json")
        write_json(paths[-1], found)
    return paths


def _write_provenance(picks: pa.Table, path: Path) -> None:
    provenance = json.loads(picks.schema.metadata[PROVENANCE.encode()])
    write_json(path.with_name(f"{path.name}.provenance.json"), provenance)
