"""The audit's sums in one pass are those that DuckDB selects, whatever the candidates are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import duckdb
import pytest

from lever_data.catalog import body, builtin
from lever_data.errors import LeverError
from lever_data.relations.db import open_session
from lever_data.relations.reward_spec import RewardSpec
from lever_data.report import kinds, scored, sums
from lever_data.report.audit import audit, audited
from lever_data.report.options import AuditRequest
from lever_data.store.store import Store
from tests.cases import long
from tests.stores import candidate, commit, new_store

TABLES = ("query_sums", "reward_by_source", "demonstration_usage", "duplicate_candidates")


def random_rows(seed: int, queries: int, **place: Any) -> list[dict[str, Any]]:
    """Candidates of every kind: nulls everywhere, ties, repeats, orders, groups of one."""
    draw = random.Random(seed)
    found = []
    for query in draw.sample(range(queries * 2), queries):
        for ordinal in range(draw.randint(1, 9)):
            correct = draw.choice([0, 0, 1, None])
            found.append(
                candidate(
                    query,
                    ordinal,
                    [500 + draw.randrange(4) for _ in range(draw.randint(0, 3))],
                    **place,
                    gen_method=draw.choice(["beam", "sample", "random", None]),
                    beam_rank=draw.choice([0, 0, 1, 2, None]),
                    temperature=draw.choice([None, 0.7, 1.3]),
                    logprob_score=draw.choice([None, -1.0, -2.5, -2.5]),
                    eval_mode=draw.choice(["file", "fallback", None]),
                    eval_failed=draw.random() < 0.1,
                    correct=correct,
                    score=draw.choice([None, 0.3, 0.6]) if correct else draw.choice([0.0, None]),
                )
            )
    return found


def rounded(con: duckdb.DuckDBPyConnection, sql: str) -> list[str]:
    """Rows in an order of their own, numbers as far as sums in another order agree."""
    return sorted(
        str([round(v, 9) + 0.0 if isinstance(v, float) else v for v in row])
        for row in con.execute(sql).fetchall()
    )


def diagnosed(store: Store, request: AuditRequest) -> duckdb.DuckDBPyConnection:
    """A connection with what an audit reads its figures from."""
    wanted = [request.view, *scored.read_by_diagnostics(), "own_pointers"]
    session = open_session(store, only=wanted)
    scored.define_diagnostics(session, request)
    return session.con


def in_one_pass(con: duckdb.DuckDBPyConnection) -> bool:
    """Whether the candidates were not brought into memory, as DuckDB's sums need them."""
    sql = "select table_type from information_schema.tables where table_name = 'scores'"
    return con.execute(sql + " and table_schema = 'audit'").fetchall() == [("VIEW",)]


def require_same_sums(store: Store, request: AuditRequest, *, one_pass: bool = True) -> None:
    """The tables of an audit are what the SQL of their relations selects."""
    con = diagnosed(store, request)
    assert in_one_pass(con) == one_pass
    found = {name: rounded(con, f"from audit.{name}") for name in TABLES}
    con.execute("create schema selected")
    con.execute("create table selected.audit_settings as from audit.audit_settings")
    con.execute("create table selected.scores as from audit.scores")
    con.execute("set schema = 'selected'")
    for name in (*TABLES[:1], "query_rewards", "source_rewards", *TABLES[1:]):
        con.execute(f"create table {name} as {body(builtin()[name])}")
    for name, rows in found.items():
        assert rows, name
        assert rows == rounded(con, f"from selected.{name}"), name


@pytest.mark.long
@pytest.mark.parametrize("batch", [long(1 << 17), 10])
def test_one_pass_sums_what_duckdb_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(sums, "_BATCH_ROWS", batch)
    monkeypatch.setattr(kinds, "_MOST_CELLS", 200)
    store = new_store(tmp_path)
    commit(store, random_rows(1, 60))
    commit(store, random_rows(2, 40, split="val"), name="b")
    require_same_sums(store, AuditRequest())
    require_same_sums(store, AuditRequest(reward=RewardSpec(expression="logprob_score")))


@pytest.mark.long
def test_runs_that_share_queries_are_sorted(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for seed in range(3):
        commit(store, random_rows(seed, 30), name=str(seed))
    require_same_sums(store, AuditRequest())


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd",
    [{"score": float("nan")}, long({"temperature": float("inf")}), long({"pointer": [1 << 25]})],
    ids=["score", "temperature", "pointer"],
)
def test_odd_rows_are_left_to_duckdb(tmp_path: Path, odd: dict[str, Any]) -> None:
    store = new_store(tmp_path)
    pointer = odd.pop("pointer", [1])
    commit(store, [*random_rows(1, 20), candidate(99, 0, pointer, **{"correct": 1} | odd)])
    reward = RewardSpec(mode="hard_only")
    require_same_sums(store, AuditRequest(reward=reward), one_pass=False)


@pytest.mark.long
def test_a_place_that_is_not_known_is_left_to_duckdb(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, random_rows(1, 20))
    (store.path / "views").mkdir()
    nameless = "select * replace (nullif(dataset, 'd') as dataset) from all_candidates"
    (store.path / "views" / "nameless.sql").write_text(nameless)
    con = diagnosed(store, AuditRequest(view="nameless"))
    assert not in_one_pass(con)
    assert con.execute("select count(*) from query_rewards").fetchall() == [(20,)]


@pytest.mark.slow
def test_a_view_that_fails_on_the_way(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, random_rows(1, 20))
    (store.path / "views").mkdir()
    failing = "select * replace (error('bang')::double as logprob_score) from all_candidates"
    (store.path / "views" / "failing.sql").write_text(failing)
    with pytest.raises(LeverError, match="SQL failed over this view: Invalid Input Error: bang"):
        audit(store, AuditRequest(view="failing"))


@pytest.mark.long
def test_many_kinds_are_left_to_duckdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_MOST_KINDS", 3)
    store = new_store(tmp_path)
    commit(store, random_rows(1, 20))
    require_same_sums(store, AuditRequest(), one_pass=False)


@pytest.mark.long
def test_the_figures_are_the_same_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path)
    commit(store, random_rows(1, 60))
    with audited(store, AuditRequest()) as (_, made):
        pass
    monkeypatch.setattr(sums, "put_sums", lambda *_: False)
    with audited(store, AuditRequest()) as (_, selected):
        assert selected.figures == made.figures
    assert audit(store, AuditRequest()).figures == made.figures
