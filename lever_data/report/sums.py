"""The sums of an audit in one pass over rows of which those of a query stand together.

In goes a connection with the relation ``scored`` of ``sql/diagnostics``; out come tables with the
rows that ``query_sums``, ``reward_by_source``, ``demonstration_usage`` and ``duplicate_candidates``
select from it, made from batches of Arrow in a fifth of the time of DuckDB's groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lever_data.catalog import builtin, documented_columns, quote_literal
from lever_data.report.kinds import DIMENSIONS, KIND, Kinds, OddRowsError, Sources, numbers

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_BATCH_ROWS = 1 << 17  # a column of a batch is 1 MB and stays in the processor's cache
_EXAMPLES_END = 1 << 24  # every example id below the largest has a place in memory
_HELD_ROWS = 1 << 18  # of a table, before they go to DuckDB, which keeps them on disk if need be
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: queries far apart


def put_sums(
    con: duckdb.DuckDBPyConnection, schema: str, levels: Mapping[str, Sequence[str]]
) -> bool:
    """Make the tables; ``False`` where DuckDB has to select them.

    Args:
        con: its current schema is ``schema``, which has the relation ``scored``.
        levels: the values of ``dataset``, ``split`` and ``gen_method`` there.
    """
    if not levels["dataset"] or not levels["split"]:
        return False
    rows = f"select {', '.join(_columns(levels))} from {schema}.scored"
    for order in ("", " order by place, query_id"):  # a sort takes longer than all the rest
        sums, cursor = _Sums(con, levels), con.cursor()
        reader = cursor.sql(rows + order).to_arrow_reader(_BATCH_ROWS)
        try:
            for queries, begins in _whole_queries(reader):
                sums.add(queries, begins)
        except (OddRowsError, OSError):  # where the view fails, DuckDB says it best
            break
        if sums.stand_together():
            sums.put()
            return True
    for table in ("query_sums", "duplicate_candidates"):
        con.execute(f"drop table {table}")
    return False


def _columns(levels: Mapping[str, Sequence[str]]) -> list[str]:
    """What is read of a candidate; texts as their number among ``levels``, 0 for null."""
    number = {
        name: f"coalesce(list_position({_listed(texts)}, {name}), 0)"
        for name, texts in levels.items()
    }
    splits = len(levels["split"]) + 1
    number["place"] = f"({number['dataset']} * {splits} + {number['split']})::integer"
    return [
        *(f"{number.get(name, name)} as {name}" for name in ("place", "query_id", *KIND)),
        "reward, score, logprob_score, pointer, hash(pointer) as pointer_hash",
        f"hash({', '.join(KIND)}) as kind",
    ]


def _listed(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(quote_literal, texts))}]::varchar[]"


def _whole_queries(reader: pa.RecordBatchReader) -> Iterator[tuple[pa.RecordBatch, Ints]]:
    """The same rows in batches that end where a query ends, and the first row of each query."""
    tail: pa.RecordBatch | None = None
    for batch in _ahead(reader):
        joined = batch if tail is None else _joined(tail, batch)
        begins = _begins(joined)
        tail = joined.slice(begins[-1])
        if len(begins) > 1:
            yield joined.slice(0, begins[-1]), begins[:-1]
    if tail is not None:
        yield tail, np.zeros(1, np.int64)


def _ahead(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """The same batches; DuckDB makes the next one while this one is summed."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, reader, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, reader, None)
            yield batch


def _joined(first: pa.RecordBatch, second: pa.RecordBatch) -> pa.RecordBatch:
    joined: pa.RecordBatch = pa.Table.from_batches([first, second]).combine_chunks().to_batches()[0]
    return joined


def _begins(rows: pa.RecordBatch) -> Ints:
    place, query = numbers(rows, "place"), numbers(rows, "query_id")
    change = np.ones(len(place), dtype=bool)
    change[1:] = (place[1:] != place[:-1]) | (query[1:] != query[:-1])
    return np.flatnonzero(change)


def _finite(rows: pa.RecordBatch, name: str) -> tuple[NDArray[Any], Bools]:
    """A column, 0 where it is null, and where it is not."""
    column = rows.column(name)
    known = np.ones(len(column), dtype=bool)
    if column.null_count:
        known = pc.is_valid(column).to_numpy(zero_copy_only=False)
        column = pc.fill_null(column, 0)
    found: NDArray[Any] = column.to_numpy()
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise OddRowsError(name)
    return found, known


class _Sums:
    """What was summed so far."""

    def __init__(self, con: duckdb.DuckDBPyConnection, levels: Mapping[str, Sequence[str]]) -> None:
        self._con, self._levels = con, levels
        self._kinds = Kinds([*levels["eval_mode"], "fallback"].index("fallback") + 1)
        self._sources = Sources()
        self._examples: dict[int, Floats] = {}  # place → [3, ids]: picks, rewards, lifts
        self._queries = _Table(con, "query_sums", levels)
        self._repeats = _Table(con, "duplicate_candidates", levels)

    def add(self, rows: pa.RecordBatch, begins: Ints) -> None:
        """Add whole queries.

        Raises:
            OddRowsError: DuckDB has to sum these.
        """
        sizes = np.diff(begins, append=rows.num_rows)
        query = np.repeat(np.arange(len(begins)), sizes)  # of every row
        reward, known = _finite(rows, "reward")
        keys = {name: numbers(rows, name)[begins] for name in ("place", "query_id")}
        splits = len(self._levels["split"]) + 1
        if not known.all() or (keys["place"] < splits).any() or not (keys["place"] % splits).all():
            raise OddRowsError("reward, dataset or split")
        mean = np.add.reduceat(reward, begins) / sizes
        lift = reward - mean[query]
        low, high = np.minimum.reduceat(reward, begins), np.maximum.reduceat(reward, begins)
        variance = np.add.reduceat(lift * lift, begins) / sizes
        kind = self._kinds.numbers(rows)
        found = keys | {
            name: np.add.reduceat(np.array(told)[kind], begins, dtype=np.int32)
            for name, told in self._kinds.counted.items()
        }
        found |= {"num_candidates": sizes.astype(np.int32), "mean_reward": mean}
        found |= {"min_reward": low, "max_reward": high}
        found["reward_variance"] = np.where(low < high, variance, 0.0)
        found |= _picks(rows, begins, query, reward, np.array(self._kinds.is_first_beam)[kind])
        found["num_pointers"] = found["num_candidates"] - self._add_repeats(rows, query, reward)
        self._queries.add(_batch(found))
        self._kinds.add(kind, reward)
        mixed = low < high
        chosen = np.flatnonzero(mixed[query])
        renumbered = (np.cumsum(mixed) - 1)[query[chosen]]
        source = np.array(self._kinds.source)[kind[chosen]]
        self._sources.add(self._kinds.sources, source, renumbered, reward[chosen])
        self._add_examples(rows, sizes, keys["place"], reward, lift)

    def _add_repeats(self, rows: pa.RecordBatch, query: Ints, reward: Floats) -> Ints:
        """Note pointers that a query holds again; how many candidates too many each query has."""
        extra = np.zeros(query[-1] + 1, np.int32)
        # one sort of a number for (query, pointer) is a tenth of the work of a group for each
        own = numbers(rows, "pointer_hash") + query.astype(np.uint64) * _MIX
        ordered = np.sort(own)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(repeated):
            return extra
        which = np.minimum(np.searchsorted(repeated, own), len(repeated) - 1)
        held = np.flatnonzero(repeated[which] == own)
        held = held[np.argsort(which[held], kind="stable")]
        first = np.flatnonzero(np.diff(which[held], prepend=-1))
        count = np.diff(first, append=len(held))
        np.add.at(extra, query[held[first]], count - 1)
        row = held[first]
        keys = {n: numbers(rows, n)[row] for n in ("place", "query_id")}
        found = _batch(
            keys
            | {
                "num_candidates": count,
                "min_reward": np.minimum.reduceat(reward[held], first),
                "max_reward": np.maximum.reduceat(reward[held], first),
            }
        )
        pointers = rows.column("pointer").take(pa.array(row))
        self._repeats.add(found.append_column("pointer", pointers))
        return extra

    def _add_examples(
        self, rows: pa.RecordBatch, sizes: Ints, places: Ints, reward: Floats, lift: Floats
    ) -> None:
        pointers = rows.column("pointer")
        ids = pointers.flatten()
        if pointers.null_count or ids.null_count:
            raise OddRowsError("pointer")
        picked = ids.to_numpy()
        if not len(picked):
            return
        if picked.min() < 0 or picked.max() >= _EXAMPLES_END:
            raise OddRowsError("pointer")
        lengths = pc.list_value_length(pointers).to_numpy()
        weights = [np.repeat(reward, lengths), np.repeat(lift, lengths)]
        present = np.unique(places)
        for place in present:
            own: Any = slice(None)
            if len(present) > 1:
                own = np.repeat(np.repeat(places == place, sizes), lengths)
            chosen = picked[own]
            held = self._examples.get(place, np.zeros((3, 0)))
            size = max(held.shape[1], int(chosen.max(initial=-1)) + 1)
            held = np.pad(held, ((0, 0), (0, size - held.shape[1])))
            held[0] += np.bincount(chosen, None, size)
            for total, weight in zip(held[1:], weights, strict=True):
                total += np.bincount(chosen, weight[own], size)
            self._examples[place] = held

    def stand_together(self) -> bool:
        """Whether no query came twice."""
        self._queries.flush()
        twice = (
            "select 1 from query_sums group by dataset, split, query_id having count(*) > 1 limit 1"
        )
        return not self._con.execute(twice).fetchall()

    def put(self) -> None:
        """Make the tables in the current schema."""
        self._repeats.flush()
        _put_rows(self._con, "reward_by_source", self._source_rows())
        usage = _Table(self._con, "demonstration_usage", self._levels)
        for place, held in self._examples.items():
            usage.add(_usage(place, held))
        usage.flush()

    def _source_rows(self) -> Iterator[tuple[object, ...]]:
        for name in DIMENSIONS:
            for value, (count, right, reward) in self._kinds.sums(name).items():
                squares, needing = self._sources.sums[name].get(value, (0.0, 0))
                shown = value
                if name == "gen_method":
                    shown = [None, *self._levels[name]][value]
                values = [shown if name == other else None for other in DIMENSIONS]
                yield name, *values, count, right / count, reward / count, squares / count, needing


def _picks(
    rows: pa.RecordBatch, begins: Ints, query: Ints, reward: Floats, first_beam: Bools
) -> dict[str, Floats]:
    """The best score of each query, and reward and score of what the policy would pick."""
    score, scored = _finite(rows, "score")
    best = np.maximum.reduceat(np.where(scored, score, -np.inf), begins)
    logprob, known = _finite(rows, "logprob_score")
    likeliest = np.maximum.reduceat(np.where(known, logprob, -np.inf), begins)
    without = ~np.logical_or.reduceat(first_beam, begins) & (likeliest > -np.inf)
    picked = first_beam
    if without.any():
        picked = first_beam | (without[query] & known & (logprob == likeliest[query]))
    chosen = np.flatnonzero(picked)
    marked = chosen[scored[chosen]]
    return {
        "best_accuracy": np.where(np.isinf(best), np.nan, best),
        "picked_reward": _means(query[chosen], reward[chosen], len(begins)),
        "picked_accuracy": _means(query[marked], score[marked], len(begins)),
    }


def _means(query: Ints, values: Floats, queries: int) -> Floats:
    """The mean of each query; NaN where it has no value."""
    with np.errstate(invalid="ignore"):
        found: Floats = np.bincount(query, values, queries) / np.bincount(query, None, queries)
    return found


def _usage(place: int, held: Floats) -> pa.RecordBatch:
    example = np.flatnonzero(held[0])
    picks, reward, lift = held[:, example]
    return _batch(
        {
            "place": np.full(len(example), place, np.int32),
            "example_id": example,
            "num_picks": picks.astype(np.int64),
            "pick_share": picks / picks.sum(),
            "mean_reward": reward / picks,
            "reward_lift": lift / picks,
            "is_hub": picks >= 10 * picks.mean(),
        }
    )


def _batch(columns: Mapping[str, NDArray[Any]]) -> pa.RecordBatch:
    """Columns as Arrow; NaN is null."""
    arrays = [pa.array(values, from_pandas=values.dtype.kind == "f") for values in columns.values()]
    return pa.record_batch(arrays, names=[*columns])


class _Table:
    """A documented relation as a table that grows; dataset and split are what ``place`` numbers."""

    def __init__(
        self, con: duckdb.DuckDBPyConnection, name: str, levels: Mapping[str, Sequence[str]]
    ) -> None:
        self._con, self._name = con, name
        self._bound = {"datasets": [*levels["dataset"]], "splits": [*levels["split"]]}
        columns = documented_columns(builtin()[name])
        types = {"dataset": "dataset_level", "split": "split_level"}
        splits = len(levels["split"]) + 1
        text = {
            "dataset": f"$datasets[place // {splits}]::dataset_level",
            "split": f"$splits[place % {splits}]::split_level",
        }
        made = ", ".join(f"{c.name} {types.get(c.name, c.type)}" for c in columns)
        con.execute(f"create or replace table {name} ({made})")
        self._selected = ", ".join(text.get(c.name, f"{c.name}::{c.type}") for c in columns)
        self._held: list[pa.RecordBatch] = []
        self._rows = 0

    def add(self, rows: pa.RecordBatch) -> None:
        self._held.append(rows)
        self._rows += rows.num_rows
        if self._rows >= _HELD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Hand on what is held."""
        if self._held:
            self._con.register("summed", pa.Table.from_batches(self._held))
            insert = f"insert into {self._name} select {self._selected} from summed"
            self._con.execute(insert, self._bound)
            self._con.unregister("summed")
        self._held, self._rows = [], 0


def _put_rows(
    con: duckdb.DuckDBPyConnection, name: str, rows: Iterator[tuple[object, ...]]
) -> None:
    columns = documented_columns(builtin()[name])
    con.execute(f"create table {name} ({', '.join(f'{c.name} {c.type}' for c in columns)})")
    con.executemany(f"insert into {name} values ({', '.join('?' * len(columns))})", [*rows])
