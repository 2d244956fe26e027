"""View → record batches: whole groups, an order that depends on the seed alone, nothing lost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import reward_sql
from lever_data.relations.stream import Selection, census, group_starts, scan
from tests.stores import candidate, commit, new_store

DEFAULT = reward_sql(RewardSpec())


def _rows() -> list[dict[str, Any]]:
    rows = []
    for query in range(40):
        for ordinal in range(1 + query % 5):
            rows.append(
                candidate(
                    query,
                    ordinal,
                    [90 + ordinal, 91 + ordinal] if ordinal % 3 else [90 + ordinal],
                    vqa_correct=ordinal % 2,
                    vqa_acc_score=0.3 * (ordinal % 2),
                    gen_method=["beam", "sample", "random"][ordinal % 3],
                    eval_mode=["file", "fallback", None][query % 3],
                    eval_failed=query == 7,
                )
            )
    return rows


@pytest.fixture
def con(tmp_path: Path) -> duckdb.DuckDBPyConnection:
    store = new_store(tmp_path)
    commit(store, _rows())
    return connect(store)


def _read(con: duckdb.DuckDBPyConnection, selection: Selection, **options: Any) -> list[list[Any]]:
    """Groups as lists of (query, shot, candidate)."""
    groups = []
    for batch in scan(con, selection, **options):
        starts = [*group_starts(batch), batch.num_rows]
        rows = batch.to_pylist()
        for low, high in pairwise(starts):
            groups.append([(r["query_id"], r["shot_num"], r["candidate"]) for r in rows[low:high]])
    return groups


def _expected() -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for row in _rows():
        if not row["eval_failed"]:
            found.setdefault((row["query_id"], row["shot_num"]), []).append(row["candidate"])
    return found


@pytest.mark.parametrize("batch_rows", [1, 3, 2048])
@pytest.mark.parametrize("order", ["random", "file"])
def test_every_group_comes_once_and_whole(
    con: duckdb.DuckDBPyConnection, batch_rows: int, order: str
) -> None:
    groups = _read(con, Selection(("candidates",), DEFAULT), order=order, batch_rows=batch_rows)
    assert {(g[0][0], g[0][1]): [c for _, _, c in g] for g in groups} == _expected()
    assert len(groups) == len(_expected())


def test_order_is_a_function_of_seed_and_epoch(con: duckdb.DuckDBPyConnection) -> None:
    selection = Selection(("all_candidates",), DEFAULT)
    first = _read(con, selection, seed=1, epoch=2)
    assert first == _read(con.cursor(), selection, seed=1, epoch=2, batch_rows=5)
    assert first != _read(con, selection, seed=1, epoch=3)
    assert first != _read(con, selection, seed=2, epoch=2)


def test_skipping_groups_gives_exactly_the_tail(con: duckdb.DuckDBPyConnection) -> None:
    selection = Selection(("all_candidates",), DEFAULT)
    whole = _read(con, selection, seed=3)
    for skip in (0, 1, 17, len(whole) - 1, len(whole)):
        assert _read(con, selection, seed=3, skip_groups=skip, batch_rows=4) == whole[skip:]


def test_filters_leave_rows_out_and_census_counts_them(con: duckdb.DuckDBPyConnection) -> None:
    selection = Selection(
        ("all_candidates",), DEFAULT, gen_methods=("beam", "sample"), skip_fallback=True
    )
    kept = [
        r
        for r in _rows()
        if not r["eval_failed"]
        and r["gen_method"] in ("beam", "sample")
        and r["eval_mode"] != "fallback"
    ]
    found = census(con, selection)
    assert found.rows == len(kept) == sum(len(g) for g in _read(con, selection))
    assert found.queries == len({r["query_id"] for r in kept})
    assert found.groups == len({(r["query_id"], r["shot_num"]) for r in kept})
    usable = [r for r in _rows() if not r["eval_failed"]]
    assert found.dropped["gen_method"] == sum(r["gen_method"] == "random" for r in usable)
    assert found.emptied == len({r["query_id"] for r in usable}) - found.queries
    assert found.datasets == (("d", "train"),)


def test_merged_shots_form_one_group_per_query(con: duckdb.DuckDBPyConnection) -> None:
    groups = _read(con, Selection(("all_candidates",), DEFAULT, merge_shots=True))
    assert len(groups) == 39
    assert all(len({query for query, _, _ in group}) == 1 for group in groups)


def test_two_views_stay_two_groups_of_a_query(con: duckdb.DuckDBPyConnection) -> None:
    one = _read(con, Selection(("beam",), DEFAULT))
    both = _read(con, Selection(("beam", "beam"), DEFAULT))
    assert sorted(both) == sorted(one + one)


def test_rewards_and_columns_pass_through(con: duckdb.DuckDBPyConnection) -> None:
    selection = Selection(("all_candidates",), DEFAULT, columns=("vqa_correct",))
    rows = pa.Table.from_batches(scan(con, selection)).to_pylist()
    assert {(r["vqa_correct"], r["reward"]) for r in rows} == {(0, 0.0), (1, 1.3)}


def test_a_missing_view_and_a_missing_column_are_named(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(UsageError, match="no such view"):
        next(scan(con, Selection(("nothing",), DEFAULT)))
    con.execute("create view thin as select run, query_id from candidates")
    with pytest.raises(LeverError, match="dataset, split, candidate, pointer"):
        next(scan(con, Selection(("thin",), DEFAULT)))


def test_a_reward_that_is_not_finite_names_the_query(con: duckdb.DuckDBPyConnection) -> None:
    expression = reward_sql(RewardSpec(expression="case when query_id = 3 then 'nan'::double end"))
    with pytest.raises(LeverError, match="query 3"):
        list(scan(con, Selection(("all_candidates",), expression)))


def test_a_run_that_vanishes_is_an_error_and_not_a_short_stream(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = commit(store, _rows())
    con = connect(store)
    store.remove(run.run)
    with pytest.raises((LeverError, duckdb.Error)):
        list(scan(con, Selection(("all_candidates",), DEFAULT)))
