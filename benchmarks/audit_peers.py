"""A few figures of the audit as one would compute them without lever, from the same Parquet files.

    python -m benchmarks.audit_peers CONTENDER STORE

``polars`` and ``rows`` (a loop in Python, which is what audit scripts are) find the candidates that
have a reward, its mean, the queries whose rewards differ, and the mean and the variance within a
query by source: some tenth of what ``lever audit`` prints. The others answer one question of
``lever query`` each. Failed evaluations and pointers that hold the query itself are left out, as
in ``all_candidates``. No file is verified. What was found is printed as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

_COLUMNS = ["query_id", "gen_method", "correct", "score", "eval_failed", "pointer"]


def polars(store: Path) -> dict[str, Any]:
    """polars, lazily."""
    import polars as pl

    scored = (
        pl.scan_parquet(_files(store), hive_partitioning=False)
        .filter(~pl.col("eval_failed") & ~pl.col("pointer").list.contains(pl.col("query_id")))
        .select("query_id", "gen_method", reward=pl.col("correct") + pl.col("score"))
    )
    queries = scored.group_by("query_id").agg(is_mixed=pl.col("reward").n_unique() > 1)
    sources = (
        scored.group_by("gen_method", "query_id")
        .agg(pl.len(), pl.col("reward").sum(), var=pl.col("reward").var(ddof=0))
        .group_by("gen_method")
        .agg(mean=pl.col("reward").sum() / pl.col("len").sum(), variance=pl.col("var").mean())
    )
    mean = scored.select(pl.len(), pl.col("reward").mean())
    found, groups, by_source = pl.collect_all([mean, queries.select(pl.sum("is_mixed")), sources])
    return {
        "candidates": found["len"][0],
        "mean_reward": found["reward"][0],
        "mixed": groups["is_mixed"][0],
        "sources": by_source.height,
    }


def rows(store: Path) -> dict[str, Any]:
    """A loop over the candidates."""
    import pyarrow.parquet as pq

    by_query: dict[int, list[float]] = defaultdict(list)
    by_source: dict[tuple[str, int], list[float]] = defaultdict(list)
    for path in sorted(store.glob("runs/*/candidates/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=_COLUMNS):
            for row in batch.to_pylist():
                if not row["eval_failed"] and row["query_id"] not in row["pointer"]:
                    reward = row["correct"] + row["score"]
                    by_query[row["query_id"]].append(reward)
                    by_source[row["gen_method"], row["query_id"]].append(reward)
    rewards = [reward for group in by_query.values() for reward in group]
    variances: dict[str, list[float]] = defaultdict(list)
    for (source, _), group in by_source.items():
        variances[source].append(pvariance(group))
    return {
        "candidates": len(rewards),
        "mean_reward": fmean(rewards),
        "mixed": sum(len(set(group)) > 1 for group in by_query.values()),
        "sources": len({source: fmean(found) for source, found in variances.items()}),
    }


_ALL = "from read_parquet(?) where not eval_failed and not list_contains(pointer, query_id)"


def duckdb_rows(store: Path) -> dict[str, Any]:
    """DuckDB on the files: how many candidates are stored."""
    return {"rows": _duckdb(store, "select count(*) from read_parquet(?)")}


def duckdb_count(store: Path) -> dict[str, Any]:
    """DuckDB on the files: how many candidates can be trained on."""
    return {"rows": _duckdb(store, f"select count(*) {_ALL}")}


def duckdb_mean(store: Path) -> dict[str, Any]:
    """DuckDB on the files: their mean accuracy by source."""
    mean = f"select gen_method, avg(score) {_ALL} group by 1 order by 1"
    return {"rows": _duckdb(store, mean)}


def _duckdb(store: Path, query: str) -> list[tuple[Any, ...]]:
    import duckdb

    return duckdb.connect().execute(query, [_files(store)]).fetchall()


def _files(store: Path) -> str:
    return str(store / "runs" / "*" / "candidates" / "*.parquet")


CONTENDERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "polars": polars,
    "rows": rows,
    "duckdb, count": duckdb_count,
    "duckdb, count of rows": duckdb_rows,
    "duckdb, mean by source": duckdb_mean,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("store", type=Path)
    given = parser.parse_args()
    print(json.dumps(CONTENDERS[given.contender](given.store)))


if __name__ == "__main__":
    main()
