"""Many small runs become one that stands for them: no figure changes, and the past stays."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from lever_data.errors import LeverError
from lever_data.relations.db import connect
from lever_data.relations.snapshot import open_snapshot
from lever_data.relations.stream import Selection
from lever_data.report.audit import audit
from lever_data.report.check import check
from lever_data.report.options import AuditRequest
from lever_data.sources.transfer import transfer
from lever_data.store.compact import compact
from lever_data.store.history import AS_OF
from lever_data.store.store import Run, Store
from tests.commands import lever
from tests.stores import Row, candidate, commit, new_store
from tests.torture.nursery import is_change

Rows = list[tuple[Any, ...]]


def _rows(store: Store, *relations: str, runs: tuple[str, ...] = ()) -> list[Rows]:
    """All rows of the relations but for the name of their run."""
    with connect(store, runs=runs, only=relations) as con:
        return [con.execute(_all_of(relation)).fetchall() for relation in relations]


def _all_of(relation: str) -> str:
    return f"select * exclude (run) from {relation} order by all"


def _batch(seed: int, queries: range | list[int]) -> list[Row]:
    draw = random.Random(seed)

    def row(query: int, number: int) -> Row:
        failed = draw.random() < 0.1
        accuracy = 0.0 if failed else draw.choice([0.0, 0.3, 1.0])
        return candidate(
            query,
            number,
            draw.sample(range(100, 104), 2),
            gen_method=draw.choice(["beam", "sample"]),
            eval_mode=draw.choice(["file", "fallback", None]),
            eval_failed=failed,
            correct=int(accuracy > 0),
            score=accuracy,
            answer=draw.choice(["red", "two"]),
            scorer="m",
        )

    return [row(q, c) for q in queries for c in range(draw.randint(1, 4))]


def _rounds(store: Store) -> list[Run]:
    """Three rounds over the same queries, each in four runs; the second was scored anew."""
    made = []
    for number in range(3):
        for part in range(4):
            rows = _batch(10 * number + part, range(5 * part, 5 * part + 5))
            made.append(commit(store, rows, kind="rollout", name=f"{number}-{part}"))
        if number == 1:
            made.append(commit(store, _batch(99, range(3, 9)), kind="rescore", name="anew"))
    return made


RELATIONS = ("stg_candidates", "candidates", "queries", "all_candidates", "balanced", "learnable")


@pytest.mark.long
def test_every_relation_has_the_rows_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path)
    made = _rounds(store)
    before = _rows(store, *RELATIONS)
    moment = datetime.now(UTC).isoformat()
    planned = compact(store, dry_run=True)
    assert [run.run for run in store.runs()] == [run.run for run in made]
    done = compact(store)
    assert done == planned
    # round by round, as a later one holds the queries of the earlier; the rescored one ends a group
    assert [[m.run for m in c.members] for c in done] == [
        [run.run for run in made[start:end]] for start, end in ((0, 4), (4, 8), (9, 13))
    ]
    assert [run.run for run in store.runs()] == [
        *(done[0].run, done[1].run, made[8].run, done[2].run)
    ]
    assert _rows(store, *RELATIONS) == before
    assert compact(store) == []
    assert check(store).problems == ()
    assert check(store).num_runs == 16
    with monkeypatch.context() as patch:
        patch.setenv(AS_OF, moment)
        assert store.runs() == made
        assert _rows(store, *RELATIONS) == before
    # a member is read where it is named; with the new run gone all members are back
    assert len(_rows(store, "candidates", runs=(made[0].run,))[0]) == made[0].num_rows
    for one in done:
        assert store.run(one.run).parents == tuple(member.run for member in one.members)
        store.remove(one.run)
    assert store.runs() == made


@pytest.mark.long
def test_audits_and_snapshots_are_what_they_were(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for number in range(4):
        commit(store, _batch(number, range(number, 20, 4)), name=str(number))

    def figures() -> dict[str, Any]:
        found = audit(store, AuditRequest(view="all_candidates")).figures
        by_run = found.pop("eval_modes")
        found["num_file"] = sum(row["num_file"] for row in by_run)
        return {k: v for k, v in found.items() if k not in ("runs", "inputs")}

    def records() -> bytes:
        con = connect(store, only=["all_candidates"])
        snapshot = open_snapshot(con, Selection(("all_candidates",), "v.score"))
        return snapshot.read(np.arange(len(snapshot.groups))).tobytes()

    before = figures(), records()
    (made,) = compact(store)
    assert len(made.members) == 4  # their queries interleave, so the rows are sorted
    assert (figures(), records()) == before


@pytest.mark.long
def test_the_shell_sees_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path)
    for number in range(6):
        commit(store, _batch(number, [number % 4, 4 + number]), name=str(number))
    compact(store)
    names = ("stg_candidates", "candidates", "queries")
    monkeypatch.chdir(store.path)
    with duckdb.connect() as shell:
        shell.execute((store.path / "views.sql").read_text())
        assert [shell.execute(_all_of(name)).fetchall() for name in names] == _rows(store, *names)
        order = shell.execute("select run from runs order by run_order").fetchall()
        assert [run for (run,) in order] == [run.run for run in store.runs()]


@pytest.mark.slow
def test_what_stays_apart(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    one = commit(store, _batch(1, [1]), name="1")
    two = commit(store, _batch(2, [2]), name="2")
    commit(store, _batch(3, [3]), name="3", kind="rollout")
    commit(store, _batch(4, [4]), name="4", parameters={"scorer": "other"})
    large = commit(store, _batch(5, range(5, 25)), name="5")
    (made,) = compact(store, max_candidates=large.num_rows - 1)
    assert made.members == (one, two)
    assert compact(store, [made.run]) == []
    (again,) = compact(store)
    assert again.members == (store.run(made.run), large)  # a compacted run is a run
    assert not {one.run, two.run, made.run} & {run.run for run in store.runs()}


@pytest.mark.slow
def test_of_two_machines_that_compact_at_once_the_first_counts(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for number in range(3):
        commit(store, _batch(number, [number]), name=str(number))
    rows = _rows(store, "stg_candidates")
    copied = Store.create(tmp_path / "copy")
    list(transfer(store, copied))
    (mine,) = compact(store, [run.run for run in store.runs()][:2])
    compact(copied)
    list(transfer(copied, store))
    assert mine.run in {run.run for run in store.runs()}
    assert _rows(store, "stg_candidates") == rows


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    runs = [commit(store, _batch(number, [number]), name=str(number)) for number in range(3)]
    place = ("--store", store.path)
    assert "runs in it" in lever("compact", *place, "--dry-run").stdout
    done = lever("compact", *place)
    assert "3" in done.stdout and "are hidden now" in done.stderr
    assert "nothing to merge" in lever("compact", *place).stderr
    assert runs[0].run not in lever("runs", *place).stdout
    lever("runs", "rm", runs[0].run, *place)
    refused = lever("--as-of", runs[1].run, "runs", *place, check=False)
    assert refused.returncode == 1 and runs[0].run in refused.stderr  # it was a run of its own then
    lever("--as-of", "2999-01-01", "runs", *place)
    assert lever("--as-of", runs[0].run, "compact", *place, check=False).returncode == 2


class Killed(BaseException):
    """Stands for kill -9: nothing on the disk changes any more."""


class _Changes:
    """Counts changes of the file system that Python asks for, and dies before one of them."""

    left: int | None = None

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left is not None and is_change(event, args):
            self.left -= 1
            if self.left <= 0:
                raise Killed


_changes = _Changes()


@pytest.fixture(scope="module", autouse=True)
def _hooked() -> None:
    sys.addaudithook(_changes.hook)  # there is no way to take it away


@contextmanager
def _killed_before(change: int) -> Iterator[None]:
    """The block dies before its n-th change, where it makes so many."""
    _changes.left = change
    try:
        yield
    except Killed:
        pass
    finally:
        _changes.left = None


@pytest.mark.long
def test_killed_before_any_change(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for number in range(3):
        commit(store, _batch(number, [2 * number, 2 * number + 1]), name=str(number))
    before = _rows(store, "stg_candidates")
    made = store.runs()
    change, done = 0, False
    while not done:
        change += 1
        with _killed_before(change):
            compact(store)
            done = True
        opened = Store.create(store.path)
        for _ in range(2):  # a lock goes when its folder is gone
            opened.make_ready()
        assert [p.name for p in opened.staging_folder.iterdir()] == ["lock"]
        if opened.runs() != made:
            assert [run.parents for run in opened.runs()] == [tuple(run.run for run in made)]
            assert _rows(opened, "stg_candidates") == before
            opened.remove(opened.runs()[0].run)
    assert change > 10


State = list[tuple[str, str, dict[str, str]]]


def _state(store: Store) -> State:
    """All that a figure depends on: the runs in their order, and the bytes of their files."""
    return [(run.run, run.committed_at, run.files) for run in store.runs()]


def _random_sequence(folder: Path, seed: int, patch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    store = new_store(folder)

    def ingest() -> None:
        number = draw.randrange(12)
        queries = random.Random(number).sample(range(9), 2)
        kind = "rollout" if number % 3 else "rl_data"
        commit(store, _batch(number, sorted(queries)), kind=kind, name=str(number))

    def remove() -> None:
        found = store.inventory()
        if runs := [*found.runs, *found.hidden]:
            store.remove(draw.choice(runs).run)

    def merge() -> None:
        rows, state = _rows(store, "candidates"), _state(store)
        with _killed_before(draw.randint(1, 30)):
            compact(store)
        assert _state(store) == state or _rows(store, "candidates") == rows

    moments: list[tuple[str, State, list[Rows] | None]] = []
    for _ in range(8):
        act: Callable[[], None] = draw.choice([ingest, ingest, ingest, remove, merge])
        with _killed_before(draw.randint(1, 30)):
            act()
        store = Store.create(store.path)
        rows = _rows(store, "candidates") if draw.random() < 0.1 else None
        moments.append((datetime.now(UTC).isoformat(), _state(store), rows))
    found = store.inventory()
    there = {(run.run, run.committed_at) for run in (*found.runs, *found.hidden)}
    for moment, state, rows in moments:
        missed = {run for run, when, _ in state if (run, when) not in there}
        with patch.context() as past:
            past.setenv(AS_OF, moment)
            if missed:
                with pytest.raises(LeverError, match="runs that were there are removed") as error:
                    store.runs()
                assert missed <= set(str(error.value.value).split(", "))
            else:
                assert _state(store) == state
                assert rows is None or _rows(store, "candidates") == rows


@pytest.mark.long
def test_any_moment_of_random_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(10):
        _random_sequence(tmp_path / str(seed), seed, monkeypatch)


@pytest.mark.long
@pytest.mark.full
@pytest.mark.timeout(3600)
def test_any_moment_of_a_thousand_random_histories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(1_000):
        _random_sequence(tmp_path / str(seed), seed, monkeypatch)
