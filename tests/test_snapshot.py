"""View → snapshot: whole groups, an order that depends on the seed alone, nothing lost; cached."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.relations import snapshot
from lever_data.relations.census import census
from lever_data.relations.records import Ids
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import reward_sql
from lever_data.relations.snapshot import Snapshot, open_snapshot
from lever_data.relations.stream import Selection, union_sql
from lever_data.store import cache as store_cache
from lever_data.store.cache import entry
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
                    correct=ordinal % 2,
                    score=0.3 * (ordinal % 2),
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


def _groups(snapshot: Snapshot, chosen: Ids) -> list[list[Any]]:
    """Groups as lists of (query, shot, candidate)."""
    found = []
    for number in chosen:
        group = snapshot.groups[number]
        query, shots = int(group["query_id"]), int(group["shot_num"])
        records = snapshot.read(np.array([number]))
        found.append([(query, shots, candidate) for candidate in records["candidate"].tolist()])
    return found


def _read(con: duckdb.DuckDBPyConnection, selection: Selection, **position: int) -> list[list[Any]]:
    snapshot = open_snapshot(con, selection)
    chosen = snapshot.groups_of(con, selection.queries)
    return _groups(snapshot, snapshot.order(con, chosen, **position) if position else chosen)


def _expected() -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for row in _rows():
        if not row["eval_failed"]:
            found.setdefault((row["query_id"], row["shot_num"]), []).append(row["candidate"])
    return found


@pytest.fixture(params=["as they stand", "sorted"])
def apart(request: pytest.FixtureRequest) -> str:
    """A view whose rows stand together by group, and one where they do not."""
    return {"as they stand": "", "sorted": " order by candidate desc"}[request.param]


@pytest.mark.slow
def test_every_group_comes_once_and_whole(con: duckdb.DuckDBPyConnection, apart: str) -> None:
    con.execute(f"create view shown as select * from candidates{apart}")
    for position in ({}, {"seed": 1, "epoch": 0}):
        groups = _read(con, Selection(("shown",), DEFAULT), **position)
        assert {(g[0][0], g[0][1]): [c for _, _, c in g] for g in groups} == _expected()
        assert len(groups) == len(_expected())


@pytest.mark.slow
def test_the_order_is_that_of_a_hash_of_the_key_seed_and_epoch(
    con: duckdb.DuckDBPyConnection,
) -> None:
    """Against one sort of all rows by DuckDB, with the keys of the columns' own types."""
    selection = Selection(("all_candidates", "beam"), DEFAULT)
    key = "view_index, dataset, split, query_id, shot_num"
    rows = con.execute(
        f"select view_index, query_id, shot_num, candidate from ({union_sql(con, selection)}) "
        f"order by hash({key}, 3::bigint, 1::bigint), {key}, run, candidate"
    ).fetchall()
    wanted = [[row[1:] for row in group] for _, group in groupby(rows, key=lambda row: row[:3])]
    assert _read(con, selection, seed=3, epoch=1) == wanted


@pytest.mark.slow
def test_order_is_a_function_of_seed_and_epoch(con: duckdb.DuckDBPyConnection) -> None:
    selection = Selection(("all_candidates",), DEFAULT)
    first = _read(con, selection, seed=1, epoch=2)
    assert first == _read(con.cursor(), selection, seed=1, epoch=2)
    assert first != _read(con, selection, seed=1, epoch=3)
    assert first != _read(con, selection, seed=2, epoch=2)


@pytest.mark.slow
def test_only_the_groups_of_the_queries_asked_for(con: duckdb.DuckDBPyConnection) -> None:
    for name, split in (("few", "train"), ("none", "test")):
        columns = f"'d' as dataset, '{split}' as split, 5 * range as query_id"
        con.execute(f"create view {name} as select {columns} from range(9)")
    found = _read(con, Selection(("all_candidates",), DEFAULT, queries="few"))
    assert found == [
        g for g in _read(con, Selection(("all_candidates",), DEFAULT)) if g[0][0] % 5 == 0
    ]
    assert _read(con, Selection(("all_candidates",), DEFAULT, queries="none")) == []


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
    found = census(con, open_snapshot(con, selection), selection)
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


@pytest.mark.slow
def test_two_views_stay_two_groups_of_a_query(con: duckdb.DuckDBPyConnection) -> None:
    one = _read(con, Selection(("beam",), DEFAULT))
    both = _read(con, Selection(("beam", "beam"), DEFAULT))
    assert sorted(both) == sorted(one + one)


def test_rewards_and_columns_pass_through(con: duckdb.DuckDBPyConnection) -> None:
    selection = Selection(("all_candidates",), DEFAULT, columns=("correct", "expected_score"))
    snapshot = open_snapshot(con, selection)
    rows = snapshot.read(snapshot.groups_of(con, None))
    assert set(zip(rows["correct"], rows["reward"], strict=True)) == {(0, 0.0), (1, 1.3)}
    assert np.isnan(rows["expected_score"]).all() and np.isnan(rows["behaviour"]).all()
    short = rows[rows["length"] == 1]
    assert short["pointer"].tolist() == [[90 + c, 0] for c in short["candidate"].tolist()]


def test_a_missing_view_and_a_missing_column_are_named(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(UsageError, match="no such view"):
        open_snapshot(con, Selection(("nothing",), DEFAULT))
    con.execute("create view thin as select run, query_id from candidates")
    with pytest.raises(LeverError, match="dataset, split, candidate, pointer"):
        open_snapshot(con, Selection(("thin",), DEFAULT))


@pytest.mark.slow
def test_a_run_that_vanishes_is_an_error_and_not_a_short_snapshot(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = commit(store, _rows())
    con = connect(store)
    store.remove(run.run)
    with pytest.raises((LeverError, duckdb.Error)):
        open_snapshot(con, Selection(("all_candidates",), DEFAULT))


def test_a_view_that_is_another_each_time_is_refused(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("create sequence steps")
    con.execute("create view odd as from candidates where query_id < 20 or nextval('steps') < 9")
    with pytest.raises(LeverError, match="reading the view twice gave other rows"):
        open_snapshot(con, Selection(("odd",), DEFAULT))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lever" / "snapshots"


def _entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


@pytest.mark.long
def test_a_snapshot_is_made_once_for_what_it_is_made_of(
    con: duckdb.DuckDBPyConnection, cache: Path
) -> None:
    one = Selection(("all_candidates",), DEFAULT)
    first = open_snapshot(con, one)
    [made] = _entries(cache)
    again = open_snapshot(con.cursor(), replace(one, queries="few"))
    assert _entries(cache) == {made} and (first.groups == again.groups).all()
    others = [
        replace(one, reward=reward_sql(RewardSpec(hard_weight=2.0))),
        replace(one, gen_methods=("beam",)),
        replace(one, skip_fallback=True),
        replace(one, merge_shots=True),
        replace(one, columns=("correct",)),
    ]
    for other in others:
        open_snapshot(con, other)
    assert len(_entries(cache)) == 1 + len(others)


@pytest.mark.long
def test_what_a_view_reads_is_part_of_the_key(tmp_path: Path, cache: Path) -> None:
    """The SQL of the user's views, the choice of runs, the scorer."""
    store = new_store(tmp_path)
    first = commit(store, _rows())
    commit(store, _rows()[:9], name="b")
    folder = tmp_path / "views"
    folder.mkdir()
    selection = Selection(("mine",), DEFAULT)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("from candidates", {}),
        ("from candidates where candidate < 3", {}),
        ("from candidates", {"runs": [first.run]}),
        ("from candidates", {"scorer": "somebody"}),
    ]
    for sql, options in cases:
        (folder / "mine.sql").write_text(sql)
        con = connect(store, sql_dir=folder, **options)
        selected = open_snapshot(con, selection)
        [count] = con.execute("from (select count(*) from mine where not eval_failed)").fetchall()
        assert (int(selected.groups["size"].sum()),) == count
    assert len(_entries(cache)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "seal"])
def test_a_damaged_snapshot_is_made_again(
    con: duckdb.DuckDBPyConnection, cache: Path, damage: str
) -> None:
    selection = Selection(("all_candidates",), DEFAULT)
    whole = _groups(found := open_snapshot(con, selection), np.arange(len(found.groups)))
    [name] = _entries(cache)
    rows = cache / name / "rows"
    if damage == "cut":
        rows.write_bytes(rows.read_bytes()[:-48])
    elif damage == "changed":
        rows.write_bytes(b"\1" + rows.read_bytes()[1:])
    elif damage == "gone":
        rows.unlink()
    else:
        (cache / name / "seal.json").write_text("{")
    found = open_snapshot(con, selection)
    assert _groups(found, np.arange(len(found.groups))) == whole


def test_what_stands_near_is_asked_of_the_disk_at_once(
    con: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_snapshot(con, Selection(("all_candidates",), DEFAULT))
    size, asked = found.record.itemsize, []
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: asked.append(words[1:3]), raising=False)
    found.ahead(np.arange(len(found.groups)))
    assert not asked  # the memory holds such a file
    monkeypatch.setattr(snapshot, "_MEMORY", 0)
    found.ahead(np.arange(0))
    assert not asked
    groups = found.groups[:8]
    ends = ((groups["start"] + groups["size"]) * size).tolist()
    found.ahead(np.array([7, 0, 3]))
    assert asked == [(0, ends[7])]
    asked.clear()
    monkeypatch.setattr(snapshot, "_NEAR", 0)
    monkeypatch.setattr(snapshot, "_ASKED", size)
    found.ahead(np.array([7, 0, 3, 4]))
    wanted = [range(0, ends[0], size), range(ends[2], ends[4], size), range(ends[6], ends[7], size)]
    assert asked == [(offset, size) for offsets in wanted for offset in offsets]


def test_a_large_selection_is_shuffled_in_two_levels(
    con: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_snapshot(con, Selection(("all_candidates",), DEFAULT))
    chosen = found.groups_of(con, None)[3:]
    rows = int(found.groups["size"][chosen].sum())
    whole = found.order(con, chosen, seed=1, epoch=2)
    monkeypatch.setattr(snapshot, "LARGE", rows * found.record.itemsize)
    assert found.order(con, chosen, seed=1, epoch=2).tolist() == whole.tolist()
    assert found.shuffle(rows) is None
    assert found.shuffle(rows + 1) == "128 stretches of 32,768 candidates at a time"
    monkeypatch.setattr(snapshot, "LARGE", rows * found.record.itemsize - 1)
    monkeypatch.setattr(snapshot, "STRETCH", 7)
    monkeypatch.setattr(snapshot, "TOGETHER", 3)
    order = found.order(con, chosen, seed=1, epoch=2)
    sizes = found.groups["size"][chosen]
    stretch = dict(zip(chosen.tolist(), ((sizes.cumsum() - sizes) // 7).tolist(), strict=True))
    met = list(dict.fromkeys(stretch[g] for g in whole.tolist()))  # in the order of the hash
    assert len(met) > 6
    windows = [met[i : i + 3] for i in range(0, len(met), 3)]
    assert order.tolist() == [g for w in windows for g in whole.tolist() if stretch[g] in w]
    assert met != sorted(met)
    monkeypatch.setattr(snapshot, "TOGETHER", 1_000)  # all of them: the order of the hash
    assert found.order(con, chosen, seed=1, epoch=2).tolist() == whole.tolist()


def test_the_order_of_a_large_selection_is_that_of_its_keys_however_they_lie(
    con: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LARGE", 0), ("STRETCH", 7), ("TOGETHER", 3)):
        monkeypatch.setattr(snapshot, name, value)
    con.execute(
        "create view later as from all_candidates order by query_id desc, len(pointer), candidate"
    )
    files = set()
    orders = set()
    for view in ("all_candidates", "later"):
        found = open_snapshot(con, Selection((view,), DEFAULT))
        files.add(tuple(found.groups["start"].tolist()))
        orders.add(tuple(found.order(con, found.groups_of(con, None), seed=5).tolist()))
    assert (len(files), len(orders)) == (2, 1)


def test_a_file_that_is_cut_while_it_is_read(con: duckdb.DuckDBPyConnection, cache: Path) -> None:
    snapshot = open_snapshot(con, Selection(("all_candidates",), DEFAULT))
    [name] = _entries(cache)
    os.truncate(cache / name / "rows", 100)
    with pytest.raises(LeverError, match="was cut while it was read"):
        snapshot.read(np.arange(len(snapshot.groups)))


@pytest.mark.long
def test_the_cache_has_a_bound_and_what_is_open_stays_readable(
    con: duckdb.DuckDBPyConnection, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = Selection(("all_candidates",), DEFAULT)
    first = open_snapshot(con, selection)
    [old] = _entries(cache)
    half_made = cache / ".0123"  # of a killed process
    half_made.mkdir()
    monkeypatch.setenv("LEVER_CACHE_SIZE", "0MB")
    second = open_snapshot(con, replace(selection, merge_shots=True))
    assert old not in _entries(cache) and len(_entries(cache)) == 1
    everything = np.arange(len(first.groups))
    assert len(first.read(everything)) == len(second.read(np.arange(len(second.groups))))
    monkeypatch.setenv("LEVER_CACHE_SIZE", "much")
    with pytest.raises(UsageError, match="is not a size"):
        open_snapshot(con, selection)


def test_small_entries_are_rarely_followed_by_a_sweep(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[str] = []
    monkeypatch.setattr(store_cache, "_sweep", lambda _, keep, limit: swept.append(keep.name))

    def write(folder: Path) -> None:
        (folder / "file").write_bytes(bytes(2_000))

    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(280, 290)]
    monkeypatch.setenv("LEVER_CACHE_SIZE", "10MB")
    for key in keys:
        with entry(key, write):
            pass
    assert swept == [key for key in keys if key.startswith("00")] == [keys[6]]
    monkeypatch.setenv("LEVER_CACHE_SIZE", "8MB")  # of which the next is more than a part in 4,096
    with entry("ff" * 32, write):
        pass
    assert swept[-1] == "ff" * 32


def test_two_at_once_make_it_once(con: duckdb.DuckDBPyConnection, cache: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "x").write_text("1")

    def read(_: int) -> str:
        with entry("ab", make) as folder:
            return (folder / "x").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(8))) == ["1"] * 8
    assert len(made) == 1


def test_a_maker_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "x").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(LeverError, match="No space left on device"), entry("ab", fail):
        pass
    assert _entries(cache) == set()


def test_a_cache_that_cannot_be_written_is_done_without(
    con: duckdb.DuckDBPyConnection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(_read(con, Selection(("all_candidates",), DEFAULT))) == len(_expected())
