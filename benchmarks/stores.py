"""A store of 1 and 10 million candidates, or of up to a billion: how each command grows with it.

    python -m benchmarks.run [--long] --only stores

The audit, counts, a group-by and the reading of a training, beside peers over the same Parquet
files. A billion, in four runs, takes an hour and 50 GB of disk; everything is measured once then,
and a peer that holds all candidates in memory is left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import PER_QUERY
from benchmarks.measure import Figure, Plan, call, figures_of, interleave, python

BILLION = 1_000  # millions
_ROOM = 50_000_000_000  # bytes of disk for the billion
_GOALS = {10: "goal 6 s and 4,000 MB", 100: "goal 60 s and 4,000 MB"}
_CACHE = "cache"  # in the store's folder, of the commands that come one after the other
QUERIES = {
    "count": "select count(*) from all_candidates",
    "count of rows": "select count(*) from stg_candidates",
    "mean by source": "select gen_method, avg(score) from all_candidates group by 1",
}


def figures(plan: Plan) -> Iterator[Figure]:
    """All of it, size by size."""
    for millions in (1, 10, 100, BILLION) if plan.long else (1, 10):
        store = plan.work / f"store-{millions}"
        if millions == BILLION:
            if (free := shutil.disk_usage(plan.work).free) < _ROOM:
                plan.say(f"a billion is left out: {free / 1e9:.0f} of {_ROOM / 1e9:.0f} GB free")
                continue
            plan = replace(plan, repeats=1)
        size = _make(plan, store, millions)
        yield from _audit(plan, store, millions, size)
        yield from _queries(plan, store, millions, size)
        yield from _training(plan, store, millions, size)
        shutil.rmtree(store)


def _make(plan: Plan, store: Path, millions: int) -> int:
    plan.say(f"making {millions:,} million candidates")
    runs = 4 if millions == BILLION else 1
    queries = millions * 1_000_000 // PER_QUERY // runs
    for run in range(runs):
        call(python("benchmarks.synthetic", store, str(queries), str(run * queries)))
    return runs * queries * PER_QUERY


def _audit(plan: Plan, store: Path, millions: int, size: int) -> Iterator[Figure]:
    """The audit, the first and when it is remembered."""
    out, cache = store / "audit.json", store / _CACHE
    words = python("lever_cli", "audit", "--store", store, "--json", out)
    peers = {1: ["polars", "rows"], BILLION: []}.get(millions, ["polars"])
    cases = {n: python("benchmarks.audit_peers", n, store) for n in peers}
    watch = millions < BILLION
    first = {"lever audit": _with_cache(cache, words, anew=True)}
    found = interleave(first | cases, plan.repeats, watch=watch)
    _agree(json.loads(out.read_text()), [found[n].said for n in peers])
    ours, *others = figures_of("audit", size, "candidates", found, plan.repeats)
    yield replace(ours, note=_GOALS.get(millions, ""))
    yield from (replace(figure, note="a tenth of it") for figure in others)
    cases.pop("rows", None)
    again = {"lever audit, again": _with_cache(cache, words)}
    found = interleave(again | cases, plan.repeats, watch=watch)
    yield from figures_of("audit, again", size, "candidates", found, plan.repeats)


def _with_cache(
    cache: Path, words: Sequence[str | Path], *, anew: bool = False
) -> list[str | Path]:
    """The words of a command that remembers what it finds in this folder, emptied before if
    ``anew``."""
    begin = 'rm -rf "$0"; ' if anew else ""
    return ["sh", "-c", f'{begin}LEVER_CACHE="$0" LEVER_CACHE_SIZE=100GB exec "$@"', cache, *words]


def _agree(ours: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """What the peers found must be what the audit says."""
    for other in others:
        assert other["candidates"] == ours["candidates"]
        assert other["mixed"] == ours["classes"]["mixed"]
        assert abs(other["mean_reward"] - ours["mean_reward"]) < 1e-9


def _queries(plan: Plan, store: Path, millions: int, size: int) -> Iterator[Figure]:
    """`lever query` beside DuckDB on the bare files."""
    for name, query in QUERIES.items():
        words = ("query", query, "--store", store, "--memory", "4", "--timeout", "3000")
        cases = {
            f"lever query, {name}": _with_cache(store / _CACHE, python("lever_cli", *words)),
            f"duckdb, {name}": python("benchmarks.audit_peers", f"duckdb, {name}", store),
        }
        found = interleave(cases, plan.repeats, watch=millions < BILLION)
        yield from figures_of(f"query, {name}", size, "candidates", found, plan.repeats)


def _training(plan: Plan, store: Path, millions: int, size: int) -> Iterator[Figure]:
    """View → tensors: with the snapshot to be made, and an epoch more of it."""
    cache = store / "snapshots"
    ours = python("benchmarks.stream", "lever", store, store)
    watch = millions < BILLION
    first = {"lever, its snapshot made": _with_cache(cache, ours, anew=True)}
    found = interleave(first, plan.repeats, watch=watch)
    yield from figures_of("first epoch", size, "candidates", found, plan.repeats)
    peers = [] if millions == BILLION else ["polars"]
    cases = {n: python("benchmarks.stream", n, store, store) for n in peers}
    found = interleave({"lever": _with_cache(cache, ours)} | cases, plan.repeats, watch=watch)
    said = {(s.said["candidates"], round(s.said["reward"])) for s in found.values()}
    assert len(said) == 1, f"the contenders disagree: {said}"
    yield from figures_of("epoch", size, "candidates", found, plan.repeats)
