"""What a snapshot counts, against one reading of the rows; the split, against one statement."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from lever_data import connect
from lever_data.relations.census import Census, census
from lever_data.relations.snapshot import open_snapshot
from lever_data.relations.stream import Selection, union_sql
from lever_train.learn import split
from lever_train.options.train import TrainConfig
from tests.cases import long_except
from tests.stores import candidate, commit, new_store


@pytest.fixture
def con(tmp_path: Path) -> duckdb.DuckDBPyConnection:
    """Two datasets and two runs, rewards and models that are missing, filters that empty queries,
    and a view whose rows of a query stand apart and some of which are of no query."""
    store, random = new_store(tmp_path), np.random.default_rng(0)
    for name in "abc":
        rows: list[dict[str, Any]] = []
        for query, ordinal in product(range(30), range(4)):
            odd = random.integers(0, 4, 6).tolist()
            row = candidate(
                query + 20 * (name == "c"),
                ordinal,
                [100 + ordinal, 200 + odd[0]][: 1 + odd[1] % 2],
                correct=None if odd[2] == 0 else odd[2] % 2,
                score=None if odd[2] == 0 else 0.3,
                gen_method=["beam", "sample", "random", None][0 if query < 5 else odd[3]],
                eval_mode=["file", "fallback", None, "file"][1 if query < 3 else odd[4]],
                eval_failed=query == 7 or odd[5] == 0,
                scorer=None if query == 9 else "m" if name == "a" else "n",
            )
            rows.append(row)
        commit(store, rows, name=name)
    con = connect(store)
    con.execute(
        "create view mine as select * replace (if(scorer = 'n', 'e''s', dataset) as dataset, "
        "if(candidate = 3 and eval_failed, null, query_id) as query_id) "
        "from candidates order by candidate, hash(query_id)"
    )
    columns = "dataset, split, query_id"
    con.execute(f"create view few as select {columns} from candidates where query_id % 3 > 0")
    con.execute("create view one as select * from candidates where scorer = 'm'")
    con.execute("create view lone as select * from candidates where coalesce(scorer, 'm') = 'm'")
    return con


def _counted(con: duckdb.DuckDBPyConnection, selection: Selection) -> Census:
    """One loop over the rows."""
    names = "view_index, dataset, split, query_id, shot_num, scorer, raw_reward"
    found = con.execute(
        f"select {names}, coalesce(eval_failed, false), gen_method, eval_mode "
        f"from ({union_sql(con, selection)}) where query_id is not null"
    ).fetchall()
    dropped = {"eval_failed": 0, "gen_method": 0, "fallback": 0}
    kept = []
    for *row, failed, method, mode in found:
        if failed:
            dropped["eval_failed"] += 1
        elif selection.gen_methods and method not in selection.gen_methods:
            dropped["gen_method"] += 1
        elif selection.skip_fallback and mode == "fallback":
            dropped["fallback"] += 1
        else:
            kept.append(row)
    queries = {tuple(row[1:4]) for row in kept}
    return Census(
        rows=len(kept),
        groups=len({tuple(row[:5]) for row in kept}),
        queries=len(queries),
        null_rewards=sum(row[6] is None for row in kept),
        datasets=tuple(sorted({(row[1], row[2]) for row in kept})),
        scorers=tuple(sorted({row[5] for row in kept} - {None})),
        dropped=dropped,
        emptied=len({tuple(row[1:4]) for row in found} - queries),
        last_query=max((row[3] for row in kept), default=-1),
    )


VIEWS = [("all_candidates",), ("mine",), ("all_candidates", "beam"), ("one",), ("lone",)]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "filtered": {"gen_methods": ("beam",), "skip_fallback": True},
    "merged": {"merge_shots": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", long_except(KINDS, "filtered"))
@pytest.mark.parametrize("views", long_except(VIEWS, ("mine",)), ids=" ".join)
def test_a_snapshot_counts_what_a_reading_counts(
    con: duckdb.DuckDBPyConnection, views: tuple[str, ...], kind: str
) -> None:
    con.execute("create view none as from few limit 0")
    selection = Selection(views, "v.score::double", **KINDS[kind])
    snapshot = open_snapshot(con, selection)
    for queries in (None, "few", "none"):
        asked = replace(selection, queries=queries)
        assert census(con, snapshot, asked) == _counted(con, asked)


def test_filters_that_leave_nothing_are_counted(con: duckdb.DuckDBPyConnection) -> None:
    nothing = Selection(("all_candidates",), "v.score::double", gen_methods=("policy",))
    found = census(con, open_snapshot(con, nothing), nothing)
    assert found == _counted(con, nothing) and found.rows == 0 < found.dropped["gen_method"]


_SPLITS = {
    "id": "row_number() over (partition by dataset, split order by query_id) - 1 "
    "< floor(count(*) over (partition by dataset, split) * 0.7::double)",
    "hash": "md5_number_lower(concat_ws('/', dataset, split, query_id)) / 18446744073709551616.0 "
    "< 0.7::double",
}


@pytest.mark.parametrize("by", long_except(sorted(_SPLITS), "hash"))
def test_a_split_is_that_of_one_statement(
    con: duckdb.DuckDBPyConnection, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "_ROWS", 8)
    config = TrainConfig.model_validate(
        {"data": {"view": ["candidates"], "split_by": by, "split_ratio": 0.7}}
    )
    con.execute("create view base as from mine where query_id is not null")
    split.split_queries(con, "base", config, by)
    keys = "select distinct dataset, split, query_id from base"
    wanted = con.execute(f"select *, {_SPLITS[by]} from ({keys}) order by all").fetchall()
    assert con.execute("from split_queries order by all").fetchall() == wanted
    assert {row[0] for row in wanted} == {"d", "e's"} and len({row[3] for row in wanted}) == 2
