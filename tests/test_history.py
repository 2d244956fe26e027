"""The store as it was: a figure of the past is the same again, or an error that says why not."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import connect
from lever_data.store.history import AS_OF
from lever_data.store.store import Store
from tests.commands import lever
from tests.stores import candidate, commit, new_store


def _figure(store: Store) -> tuple[list[str], int]:
    """The runs, and a figure over all of them that any other choice would change."""
    sql = "select coalesce(sum(query_id), 0)::bigint from stg_candidates"
    con = connect(store, only=["stg_candidates"])
    return [run.run for run in store.runs()], con.execute(sql).fetchall()[0][0]


def _add(store: Store, number: int) -> str:
    return commit(store, [candidate(2**number, 0, [1])], name=str(number)).run


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_any_moment_of_a_random_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    store = new_store(tmp_path)
    moments: list[tuple[list[str], tuple[list[str], int], int]] = []  # names, figure, step
    removed: list[tuple[int, str]] = []  # step, run
    for step in range(14):
        here = [run.run for run in store.runs()]
        names = []
        if here and draw.random() < 0.3:
            removed.append((step, store.remove(draw.choice(here))))
        else:
            names = [
                _add(store, draw.randrange(8))
            ]  # one of an earlier run comes back, or is there
            names = names if names[0] not in here else []
        moments.append(([*names, datetime.now(UTC).isoformat()], _figure(store), step))
    for names, figure, step in moments:
        missed = sorted({run for at, run in removed if at > step and run in figure[0]})
        for name in names:
            if name in {run for at, run in removed if at > step}:
                continue  # the run itself is gone, or was made again later
            monkeypatch.setenv(AS_OF, name)
            if not missed:
                assert _figure(store) == figure
                continue
            with pytest.raises(LeverError, match="runs that were there are removed") as error:
                _figure(store)
            assert error.value.value == ", ".join(missed)
        monkeypatch.delenv(AS_OF)


def test_a_moment_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path)
    gone, _ = _add(store, 1), _add(store, 2)
    store.remove(gone)
    for moment, message in (
        (gone, "as of a run that is removed"),
        ("yesterday", "neither a run nor a time"),
        ("rl_data", "runs that were there are removed"),  # the one that is left
    ):
        monkeypatch.setenv(AS_OF, moment)
        with pytest.raises(LeverError, match=message):
            store.runs()


def test_a_removal_that_was_cut_short_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note is written first."""
    store = new_store(tmp_path)
    run = _add(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr("lever_data.store.store._rename_run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.remove(run)
    monkeypatch.setenv(AS_OF, run)
    assert [found.run for found in store.runs()] == [run]


def test_nothing_is_written_to_the_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path)
    run = _add(store, 1)
    monkeypatch.setenv(AS_OF, run)
    with pytest.raises(UsageError, match="nothing is written to a store that is read as of"):
        _add(store, 2)
    with pytest.raises(UsageError, match="nothing is written to a store that is read as of"):
        store.remove(run)


@pytest.mark.long
def test_the_flag(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    first, second = _add(store, 1), _add(store, 2)
    asked = ("runs", "--store", str(store.path), "--json", "-")
    done = lever("--as-of", first, *asked)
    assert first in done.stdout and second not in done.stdout
    count = ("query", "select count(*) as n from candidates", "--store", str(store.path))
    assert "1" in lever("--as-of", first, *count, "--format", "csv").stdout.split()
    assert "2" in lever("--as-of", "2999-01-01", *count, "--format", "csv").stdout.split()
    refused = lever("--as-of", first, "ingest", "x.json", "--store", store.path, check=False)
    assert refused.returncode == 2 and "lever ingest writes to the store" in refused.stderr
