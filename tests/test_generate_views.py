"""`lever generate` over views: pointers answered afresh, more where rewards are all equal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lever_data.errors import LeverError
from lever_data.relations.db import connect
from lever_train.rollout.generate import forecast, generate
from tests.rollouts import World, make_world, rows


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.mark.long
def test_from_view_answers_stored_pointers_afresh(world: World) -> None:
    first = generate(world.request())
    assert first.run is not None
    again = world.request(
        from_view="all_candidates", runs=(first.run.run,), pool=None, dataset=None, split=None
    )
    outcome = generate(again)
    assert outcome.run is not None
    assert outcome.tally.asked == 0  # same scorer, same prompts
    assert outcome.run.parents == (first.run.run,)
    same = ("query_id", "pointer", "gen_method", "logprob_score", "temperature", "score")
    pairs = zip(rows(first.run), rows(outcome.run), strict=True)
    assert all(a[c] == b[c] for a, b in pairs for c in same)
    shorter = generate(again.but(shot_num=1))
    ones = rows(shorter.run)
    assert {len(r["pointer"]) for r in ones} == {1}
    assert len({(r["query_id"], *r["pointer"]) for r in ones}) == len(ones)
    with pytest.raises(LeverError, match="has fewer than 3 demonstrations"):
        generate(again.but(shot_num=3))


@pytest.mark.long
def test_target_view_adds_only_what_is_new(world: World) -> None:
    first = generate(world.request())
    assert first.run is not None
    _tied_view(world)
    request = world.request(target_view="tied", runs=(first.run.run,))
    before, tied = _learnable(world, [first.run.run])
    told = forecast(request)
    outcome = generate(request)
    assert outcome.run is not None
    new = rows(outcome.run)
    assert told.candidates == len(new) == outcome.report.candidates
    known = {(r["query_id"], *r["pointer"]) for r in rows(first.run)}
    assert not known & {(r["query_id"], *r["pointer"]) for r in new}
    assert {r["query_id"] for r in new} <= tied
    after, _ = _learnable(world, [first.run.run, outcome.run.run])
    assert before < after
    assert outcome.run.parents == (first.run.run,)


@pytest.mark.long
def test_a_budget_is_kept_and_stops_at_queries_that_can_teach(world: World) -> None:
    first = generate(world.request(num_beams=2, temps=(1.0,), num_samples_per_temp=1))
    assert first.run is not None
    _tied_view(world)
    _, tied = _learnable(world, [first.run.run])
    request = world.request(
        target_view="tied", runs=(first.run.run,), budget=25 * len(tied), num_beams=2
    )
    outcome = generate(request)
    assert outcome.run is not None
    new = rows(outcome.run)
    assert len(new) <= 25 * len(tied)
    pointers = [(r["query_id"], *r["pointer"]) for r in new]
    assert len(set(pointers)) == len(pointers)
    assert len(new) < 25 * len(tied)  # all of them can teach before it is spent
    assert not _learnable(world, [first.run.run, outcome.run.run])[1]
    helped = Counter(r["query_id"] for r in new)
    assert min(helped.values()) < 10 < max(helped.values())  # more rounds for the stubborn
    small = generate(world.request(target_view="tied", runs=(first.run.run,), budget=7))
    assert small.report.candidates == 7


@pytest.mark.long
def test_queries_and_limit_choose(world: World) -> None:
    views = world.folder / "sql"
    views.mkdir()
    (views / "some.sql").write_text("select * from all_candidates where query_id in (3, 4, 17, 30)")
    generate(world.request())
    chosen = generate(world.request(queries="some", sql_dir=views, seed=5))
    assert sorted({r["query_id"] for r in rows(chosen.run)}) == [3, 4, 17, 30]
    limited = generate(world.request(queries="some", sql_dir=views, limit=2, seed=5))
    assert sorted({r["query_id"] for r in rows(limited.run)}) == [3, 4]
    kept = [r for r in rows(chosen.run) if r["query_id"] in (3, 4)]
    assert rows(limited.run) == kept  # a query's rows do not depend on the others


def _tied_view(world: World) -> None:
    folder = world.store / "views"
    folder.mkdir(exist_ok=True)
    (folder / "tied.sql").write_text(
        "select all_candidates.* from all_candidates "
        "anti join learnable using (dataset, split, query_id)"
    )


def _learnable(world: World, runs: list[str]) -> tuple[int, set[int]]:
    """How many queries can teach, and the ids of those that cannot."""
    con = connect(world.store, runs=runs)
    good = {q for (q,) in con.execute("select distinct query_id from learnable").fetchall()}
    every = {q for (q,) in con.execute("select distinct query_id from candidates").fetchall()}
    return len(good), every - good
