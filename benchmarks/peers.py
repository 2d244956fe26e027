"""RL data JSON → Parquet as one would write it without lever: the peers of ``lever ingest``.

    python -m benchmarks.peers CONTENDER SOURCE.json OUT.parquet

Each reads the file of ``benchmarks/generate.py`` and writes one row per candidate with its query
id, ordinal and fields. None checks a pointer, keeps unknown keys, hashes the source or commits
atomically, all of which ``lever ingest`` does. The number of rows is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CANDIDATE = (
    "struct(pointer integer[], gen_method varchar, beam_rank integer, beam_score double, "
    "logprob_score double, temperature double, vqa_pred_answer varchar, vqa_correct tinyint, "
    "vqa_acc_score double, vqa_eval_mode varchar)"
)


def json_pyarrow(source: Path, out: Path) -> int:
    """The standard library's json, then Arrow."""
    with source.open(encoding="utf-8") as file:
        return _write(json.load(file), out)


def orjson_pyarrow(source: Path, out: Path) -> int:
    """orjson, then Arrow."""
    import orjson

    return _write(orjson.loads(source.read_bytes()), out)


def duckdb_json(source: Path, out: Path) -> int:
    """DuckDB's JSON reader, told the type of the map."""
    import duckdb

    con = duckdb.connect()
    con.execute(
        f"""copy (
            select
                entry.key::bigint as query_id,
                unnest(range(len(entry.value.pointer_candidates))) as candidate,
                unnest(entry.value.pointer_candidates, recursive := true)
            from (
                select unnest(map_entries(queries)) as entry
                from read_json(
                    $source,
                    format = 'unstructured',
                    records = false,
                    columns = {{'queries':
                        'map(varchar, struct(pointer_candidates {_CANDIDATE}[]))'}},
                    maximum_object_size = 4000000000
                )
            )
        ) to '{out}' (format parquet, compression zstd)""",
        {"source": str(source)},
    )
    return int(con.execute("select count(*) from read_parquet(?)", [str(out)]).fetchall()[0][0])


def polars_json(source: Path, out: Path) -> int:
    """polars, which makes a column of every query, then rows of the columns."""
    import polars as pl

    rows = (
        pl.read_json(source)
        .unpivot(variable_name="query_id")
        .select(
            pl.col("query_id").cast(pl.Int64),
            pl.col("value").struct.field("pointer_candidates").alias("record"),
            candidate=pl.int_ranges(pl.col("value").struct.field("pointer_candidates").list.len()),
        )
        .explode("record", "candidate")
        .unnest("record")
    )
    rows.write_parquet(out, compression="zstd")
    return rows.height


def _write(data: dict[str, Any], out: Path) -> int:
    import pyarrow as pa  # not above: DuckDB and polars need none of it, and it takes 0.15 s
    import pyarrow.parquet as pq

    rows = [
        {"query_id": int(key), "candidate": ordinal, **record}
        for key, value in data.items()
        for ordinal, record in enumerate(value["pointer_candidates"])
    ]
    pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd")
    return len(rows)


CONTENDERS: dict[str, Callable[[Path, Path], int]] = {
    "json + pyarrow": json_pyarrow,
    "orjson + pyarrow": orjson_pyarrow,
    "duckdb": duckdb_json,
    "polars": polars_json,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    rows = CONTENDERS[given.contender](given.source, given.out)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
