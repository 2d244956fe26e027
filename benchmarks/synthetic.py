"""A store of synthetic RL data of any size: ``python -m benchmarks.synthetic DIR [QUERIES] [LOW]``

15 candidates a query: 5 beams, 4 samples at each of two temperatures, 2 random. Half of the
queries have no right candidate; the others have some, so that every class of query occurs. A few
rows are fallback, unknown or failed, a few pointers occur twice or in another order. From the
262,145th query on they repeat under new ids, so that a billion candidates take minutes. A second
call whose ids begin at LOW adds a second run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks import PER_QUERY
from lever_data.store.schema import CANDIDATES, QUERIES
from lever_data.store.store import Run, RunSpec, Store

POOL = 9_009  # examples, as many as OK-VQA has training questions
CHUNK = 65_536  # queries generated at a time
DISTINCT = 4  # chunks that differ

_CANDIDATES = """
with rolls as (
    select
        q as query_id,
        c as candidate,
        hash(q, 'difficulty', $seed) % 1000 / 1000.0 as difficulty,
        hash(q, least(c, 13), 'right', $seed) % 1000 / 1000.0 as luck,
        hash(q, c, 'eval', $seed) % 1000 as evaluation,
        (hash(q, least(c, 13), 'a', $seed) % $pool)::integer as first,
        (hash(q, least(c, 13), 'b', $seed) % ($pool - 1))::integer as step
    from range($low, $high) as queries(q), range($per_query) as candidates(c)
),

scored as (
    select
        *,
        difficulty > 0.5 and luck < difficulty - 0.4 and evaluation <> 999 as is_right,
        ((first + 1 + step) % $pool)::integer as second
    from rolls
)

select
    'synthetic' as dataset,
    'train' as split,
    query_id,
    candidate::integer as candidate,
    2::tinyint as shot_num,
    case when candidate = 14 then [second, first] else [first, second] end as pointer,
    case when candidate < 5 then 'beam' when candidate < 13 then 'sample' else 'random' end
        as gen_method,
    case when candidate < 5 then candidate::integer end as beam_rank,
    case when candidate < 5 then 0.15 - 0.001 * candidate end as beam_score,
    case when candidate < 13 then -5.0 - luck - 0.1 * candidate end as logprob_score,
    case when candidate between 5 and 8 then 1.0 when candidate between 9 and 12 then 1.3 end
        as temperature,
    case when evaluation < 30 then 'fallback' when evaluation >= 40 then 'file' end as eval_mode,
    evaluation = 999 as eval_failed,
    case when is_right then 'answer ' || first % 50 else 'other ' || second % 50 end
        as answer,
    is_right::tinyint as correct,
    case when is_right then [0.3, 0.6, 0.9, 1.0][1 + first % 4] else 0.0 end as score,
    'synthetic' as scorer
from scored
order by query_id, candidate
"""

_KEYS = "select 'synthetic' as dataset, 'train' as split, range as query_id from range(?, ?)"


def make_store(path: Path, queries: int, *, first: int = 0, seed: int = 0) -> Run:
    """Commit one run of ``queries`` × 15 candidates, of queries from ``first`` on; the same seed
    gives the same rows."""
    parameters = {"queries": queries, "first": first, "seed": seed}
    spec = RunSpec("rl_data", "synthetic", "train", parameters=parameters)
    store = Store.create(path)
    con = duckdb.connect()
    made: list[pa.Table] = []
    with store.begin(spec) as writer:
        for low in range(0, queries, CHUNK):
            number = low // CHUNK
            if number < DISTINCT:
                bounds = {"low": low, "high": min(low + CHUNK, queries), "per_query": PER_QUERY}
                rows = con.sql(_CANDIDATES, params={**bounds, "seed": seed, "pool": POOL})
                made.append(_conform(rows.to_arrow_table(), CANDIDATES))
            again = number % DISTINCT
            count = min(CHUNK, queries - low)
            rows = made[again].slice(0, count * PER_QUERY)
            writer.write("candidates", _moved(rows, first + low - again * CHUNK))
            keys = con.sql(_KEYS, params=[first + low, first + low + count])
            writer.write("queries", _conform(keys.to_arrow_table(), QUERIES))
        return writer.commit()


def _moved(rows: pa.Table, by: int) -> pa.Table:
    """The same rows with ``by`` more in every query id."""
    place = rows.schema.get_field_index("query_id")
    field = rows.schema.field(place)
    ids = pc.add(rows["query_id"], pa.scalar(by, field.type))
    return rows.set_column(place, field, ids)


def _conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """``rows`` with every column of ``schema``, null where they have none."""
    columns = [
        rows[f.name].cast(f.type) if f.name in rows.column_names else pa.nulls(len(rows), f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)


def main() -> None:
    start = time.perf_counter()
    queries = int(sys.argv[2]) if len(sys.argv) > 2 else 666_667
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    run = make_store(Path(sys.argv[1]), queries, first=first)
    print(f"{run.run}: {run.num_rows:,} candidates in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
