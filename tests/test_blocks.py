"""Without room for a snapshot: the same groups and rows from the views, in a coarser order."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pytest

from lever_data import connect
from lever_data.errors import LeverError
from lever_data.relations import blocks
from lever_data.relations.blocks import open_blocks
from lever_data.relations.census import census
from lever_data.relations.records import GROUP
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import reward_sql
from lever_data.relations.snapshot import NoRoomError, open_snapshot
from lever_data.relations.stream import Selection
from lever_train.learn.state import StateError
from tests.stores import candidate, commit, new_store
from tests.training import Bench, equal

DEFAULT = reward_sql(RewardSpec())
TWO_VIEWS = Selection(("all_candidates", "late"), DEFAULT, columns=("score",))


def _rows(split: str, step: int) -> list[dict[str, Any]]:
    return [
        candidate(
            step * query,
            ordinal,
            [90 + ordinal, 91 + ordinal] if ordinal % 3 else [90 + ordinal],
            split=split,
            correct=ordinal % 2,
            score=0.3 * (ordinal % 2),
            gen_method="beam" if ordinal % 2 else "sample",
            eval_failed=query == 7,
        )
        for query in range(40)
        for ordinal in range(1 + query % 5)
    ]


@pytest.fixture
def con(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> duckdb.DuckDBPyConnection:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 40)
    monkeypatch.setattr(blocks, "WINDOW", 3)
    store = new_store(tmp_path)
    commit(store, _rows("train", 3))
    commit(store, _rows("val", 1), name="b")
    con = connect(store)
    con.execute("create view late as from all_candidates where query_id > 9 order by query_id desc")
    return con


def test_the_groups_and_their_rows_are_those_of_a_snapshot(con: duckdb.DuckDBPyConnection) -> None:
    whole, found = open_snapshot(con, TWO_VIEWS), open_blocks(con, TWO_VIEWS)
    names = [name for name in GROUP.names or () if name != "start"]
    assert (found.groups[names] == whole.groups[names]).all()
    assert found.block.max() > 6
    assert census(con, found, TWO_VIEWS) == census(con, whole, TWO_VIEWS)
    everything = np.arange(len(whole.groups))
    for chosen in (everything, np.random.default_rng(0).permutation(everything)):
        assert found.read(chosen).tobytes() == whole.read(chosen).tobytes()
    assert not len(found.read(everything[:0]))


def test_a_query_and_a_place_are_in_one_block(con: duckdb.DuckDBPyConnection) -> None:
    found = open_blocks(con, TWO_VIEWS)
    keys = found.groups[["view_index", "dataset", "split", "query_id"]].tolist()
    of_query: dict[Any, set[int]] = {}
    places: dict[int, set[Any]] = {}
    for key, block in zip(keys, found.block.tolist(), strict=True):
        of_query.setdefault(key, set()).add(block)
        places.setdefault(block, set()).add(key[:3])
    assert all(len(held) == 1 for held in [*of_query.values(), *places.values()])
    rows = np.bincount(found.block, found.groups["size"])
    assert rows.max() < 40 + 5  # a block ends after the query in which it is full


def test_the_order_is_shuffled_in_two_levels(con: duckdb.DuckDBPyConnection) -> None:
    found = open_blocks(con, TWO_VIEWS)
    chosen = found.groups_of(con, None)
    order = found.order(con, chosen, seed=1, epoch=2)
    assert sorted(order) == chosen.tolist()
    assert order.tolist() == found.order(con.cursor(), chosen, seed=1, epoch=2).tolist()
    assert order.tolist() != found.order(con, chosen, seed=1, epoch=3).tolist()
    block = found.block[order]
    numbers, first = np.unique(block, return_index=True)
    _, from_the_end = np.unique(block[::-1], return_index=True)
    last = len(block) - 1 - from_the_end
    held = [((first <= i) & (i <= last)).sum() for i in range(len(block))]
    assert max(held) == 3 < len(numbers)  # so many blocks are in memory
    assert np.argsort(first).tolist() != numbers.tolist()
    assert (np.diff(block) != 0).mean() > 0.5  # and their groups are mixed


def test_a_view_that_is_another_each_time_is_refused(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("create sequence steps")
    con.execute("create view odd as from candidates where query_id < 90 or nextval('steps') < 9")
    with pytest.raises(LeverError, match="reading the view twice gave other rows"):
        open_blocks(con, Selection(("odd",), DEFAULT))
    con.execute("create table kept as from candidates")
    found = open_blocks(con, Selection(("kept",), DEFAULT))
    con.execute("update kept set query_id = query_id + 1 where query_id = 30")
    with pytest.raises(LeverError, match="reading the view twice gave other rows"):
        found.read(np.arange(len(found.groups)))


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache whose disk takes the groups of a small training, and not its candidates."""
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000))
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 20)
    monkeypatch.setattr(blocks, "WINDOW", 2)


class _StopError(Exception):
    """Raised in place of a kill."""


@pytest.mark.long
@pytest.mark.usefixtures("small_disk")
def test_a_training_without_room_says_so_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {"rce_epochs": 2, "save_every": 1, "batch_size": 4}
    bench = Bench(tmp_path)
    bench.train("whole", **flags)
    assert f"{tmp_path}/cache has no room for what is trained on: it is read from the views" in (
        " ".join(bench.said)
    )
    left = [9]

    def advance(done: float, total: float | None, note: str = "") -> None:
        left[0] -= 1
        if left[0] < 0:
            raise _StopError

    with pytest.raises(_StopError):
        bench.train("killed", advance=advance, **flags)
    shutil.copytree(tmp_path / "killed", tmp_path / "moved")
    bench.train("killed", resume=True, **flags)
    assert equal(bench.tensors("killed"), bench.tensors("whole"))
    monkeypatch.undo()  # room again: another order would end elsewhere
    with pytest.raises(StateError, match=r"shuffle was .*2 blocks of 20 candidates at a time"):
        bench.train("moved", resume=True, **flags)


@pytest.mark.usefixtures("small_disk")
def test_no_room_for_the_groups_either(
    con: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoRoomError, match="what training reads takes"):
        open_snapshot(con, TWO_VIEWS)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(NoRoomError, match=r"0\.0 GB on disk, and 0\.0 GB are free"):
        open_blocks(con, TWO_VIEWS)
