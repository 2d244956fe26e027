"""Hostile SQL, names and stores: nothing is written, nothing outside the store is read.

SQL comes in as queries, views, rewards and data tests; names as those of data sets, runs and
views. What a file may hold is in test_hostile_files.py.
"""

from __future__ import annotations

import io
import json
import shutil
from contextlib import closing
from pathlib import Path

import duckdb
import pytest

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import open_session, require_select
from lever_data.relations.query import write_query
from lever_data.relations.reward_spec import RewardSpec
from lever_data.relations.rewards import reward_sql
from lever_data.relations.snapshot import open_snapshot
from lever_data.relations.stream import Selection
from lever_data.report.check import check
from lever_data.sources.export import export
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.manifest import sealed
from lever_data.store.store import Store
from tests.cases import long_except
from tests.commands import lever
from tests.stores import candidate, commit, new_store

ODD = {
    "quotes": "a'b\"c`d",
    "sql": "x'); drop table runs; --",
    "climbing": "../../../tmp/x",
    "absolute": "/etc/passwd",
    "newlines": "a\nb\r\nc",
    "nul": "a\0b",
    "wild": "*[!a]?{b}",
    "long": "n" * 5_000,
    "options": "--store",
    "chinese": "数据集",
    "bidi": "a\u202eb",
    "dots": "..",
}


def test_no_name_of_a_data_set_holds_a_null_character() -> None:
    with pytest.raises(UsageError, match="null character"):
        IngestOptions(dataset=ODD["nul"])


@pytest.mark.slow
@pytest.mark.parametrize("name", long_except(sorted(ODD.keys() - {"nul"}), "sql", "climbing"))
def test_names_of_data_sets_stay_data(tmp_path: Path, name: str) -> None:
    source = tmp_path / "a.json"
    record = {"pointer": [1, 2], "gen_method": ODD[name], "vqa_correct": 1}
    source.write_text(json.dumps({"0": {"pointer_candidates": [record]}}))
    store = Store.create(tmp_path / "store")
    outside = sorted(p for p in tmp_path.rglob("*") if store.path not in p.parents)
    run = next(iter(ingest([source], store, IngestOptions(dataset=ODD[name], split=ODD[name])))).run
    assert run.path.parent == store.path / "runs"
    assert run.run.replace("-", "").replace("_", "").isalnum() and len(run.run) < 200
    con = connect(store, runs=[run.run], only=["candidates"])
    rows = con.execute("select dataset, split from candidates")
    assert rows.fetchall() == [(ODD[name], ODD[name])]
    assert (store.path / "views.sql").read_text().count(ODD["sql"]) == 0
    assert sorted(p for p in tmp_path.rglob("*") if store.path not in p.parents) == outside


@pytest.mark.slow
@pytest.mark.parametrize("name", long_except(ODD, "sql", "nul"))
def test_names_of_runs_and_views_are_looked_up_and_nothing_else(tmp_path: Path, name: str) -> None:
    store = new_store(tmp_path)
    run = commit(store, [candidate(0, 0, [1])])
    victim = tmp_path / "run=x"
    victim.mkdir()
    odd = ODD[name]
    with pytest.raises(LeverError):
        store.remove(odd)
    with pytest.raises(LeverError):
        connect(store, runs=[odd])
    with pytest.raises(LeverError):
        export(store, odd, tmp_path / "o.json")
    with pytest.raises(LeverError):
        open_snapshot(connect(store, only=["beam"]), Selection((odd,), "correct"))
    done = lever("views", "show", "--store", store.path, "--", odd, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
    assert victim.is_dir() and store.runs() == [run]


@pytest.mark.slow
def test_an_identifier_never_ends_its_quotes(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1], correct=1)])
    con = connect(store)
    for view in ('beam" as x; drop view "beam', "beam; drop view beam", '"beam"', "beam --"):
        with pytest.raises(LeverError):
            open_snapshot(con, Selection((view,), "correct"))
    assert con.execute("select count(*) from beam").fetchall() == [(1,)]


WRITING = [
    "copy (select 1) to '{out}'",
    "with x as (copy (select 1) to '{out}') select 1 as a",
    "attach '{out}' as y",
    "create table t as select 1",
    "insert into runs (run) values ('x')",
    "delete from runs",
    "install httpfs",
    "load httpfs",
    "set enable_external_access = true",
    "reset enable_external_access",
    "pragma enable_external_access",
    "call pragma_version()",
    "export database '{out}'",
    "vacuum",
    "checkpoint",
    "select 1; select 2",
    "select * from read_text('/etc/passwd')",
    "select * from read_blob('/proc/self/environ')",
    "select * from read_csv('/etc/passwd')",
    "select * from '/etc/passwd'",
    "select * from glob('/etc/*')",
    "select * from read_parquet('/etc/*.parquet')",
    "select * from query('copy (select 1) to ''{out}''')",
    "select * from query_table('/etc/passwd')",
    "select * from sniff_csv('/etc/passwd')",
    "select * from read_json('{store}/../secret.json')",
    "select * from parquet_metadata('{store}/../secret.parquet')",
    "select getenv('LEVER_TEST_KEY')",
    "select * from 'http://127.0.0.1:9/x.csv'",
]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LEVER_TEST_KEY", "sk-secret")
    made = new_store(tmp_path)
    rows = [candidate(q, c, [q + 10, q + c + 11], correct=c) for q in (0, 1, 2) for c in (0, 1)]
    commit(made, rows)
    (tmp_path / "secret.json").write_text('{"a": 1}')
    (tmp_path / "secret.parquet").write_bytes(next(made.path.rglob("*.parquet")).read_bytes())
    return made


def _files(store: Store) -> set[str]:
    return {str(p) for p in store.path.parent.rglob("*")}


# What tests/test_query.py does not try already.
QUERIES = [
    s for s in WRITING if any(word in s for word in ("set", "proc", "secret", "env", "http"))
]


@pytest.mark.parametrize("sql", QUERIES)
def test_a_hostile_query_changes_and_reads_nothing(store: Store, sql: str, tmp_path: Path) -> None:
    text = sql.format(out=store.path / "x", store=store.path)
    before = _files(store)
    with (
        closing(open_session(store, only=["beam"]).con) as con,
        pytest.raises((LeverError, duckdb.Error)),
    ):
        con.execute("set lock_configuration = true")
        require_select(con, text)
        con.sql(text).fetchall()
    assert _files(store) == before


@pytest.mark.slow
def test_no_module_of_the_current_folder_is_imported(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    out = io.BytesIO()
    assert write_query(store.path, "select 1 as one", "csv", out) == 1
    assert out.getvalue() == b"one\n1\n"


@pytest.mark.slow
def test_hostile_views_are_broken_views(store: Store) -> None:
    folder = store.path / "views"
    folder.mkdir()
    for number, sql in enumerate(WRITING):
        text = sql.format(out=store.path / "x", store=store.path)
        (folder / f"hostile_{number}.sql").write_text(text)
    (folder / "mine.sql").write_text("select count(*) as n from beam")
    (folder / "Bad Name.sql").write_text("select 1")
    (folder / "beam.sql").write_text("select 1")
    (folder / "binary.sql").write_bytes(b"\xff\xfe select 1")
    (folder / "loop.sql").symlink_to(folder / "loop.sql")
    before = _files(store)
    session = open_session(store)
    assert session.con.execute("select n from mine").fetchall() == [(6,)]
    usable = {n for n in session.relations if n.startswith("hostile_")}
    for name in usable:  # bound without reading: it must fail when it is read
        with pytest.raises(duckdb.Error):
            session.con.execute(f"select * from {name}").fetchall()
    assert {"Bad Name", "beam", "binary", "loop"} <= session.broken.keys()
    assert _files(store) == before
    listed = lever("views", "--store", store.path, check=False)
    assert "hostile_0" in listed.stdout and "Traceback" not in listed.stderr


NO_EXPRESSIONS = ("1) as r from beam; drop view beam; --", "1; drop view beam", "*", "", "1, 2")
PLACES = ("({})", "(select a from ({}))", "1) from beam; {}; --")


@pytest.mark.slow
@pytest.mark.parametrize("place", long_except(PLACES, PLACES[1]))
def test_a_hostile_reward_is_refused(store: Store, place: str) -> None:
    before = _files(store)
    con = connect(store, only=["beam"])
    texts = [sql.format(out=store.path / "x", store=store.path) for sql in WRITING]
    rewards = [*NO_EXPRESSIONS, *(place.format(text) for text in texts)]
    for reward in rewards:
        with pytest.raises(LeverError):
            open_snapshot(con, Selection(("beam",), reward_sql(RewardSpec(expression=reward))))
    assert _files(store) == before
    assert con.execute("select count(*) from beam").fetchall() == [(6,)]
    done = lever("audit", "--store", store.path, "--reward", rewards[-1], check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_hostile_data_tests_are_reported(store: Store) -> None:
    folder = store.path / "tests"
    folder.mkdir()
    for number, sql in enumerate(WRITING):
        text = sql.format(out=store.path / "x", store=store.path)
        (folder / f"hostile_{number}.sql").write_text(text)
    before = _files(store)
    found = {p.where for p in check(store).problems}
    assert found == {f"hostile_{n}" for n in range(len(WRITING))}
    assert _files(store) == before


def test_a_hostile_store_reads_no_file_outside(store: Store, tmp_path: Path) -> None:
    run = store.runs()[0]
    manifest = json.loads((run.path / "manifest.json").read_bytes())
    for name in ("candidates/../../../../secret.parquet", "/etc/passwd", "x\n.parquet", "..", ""):
        forged = {k: v for k, v in manifest.items() if k != "seal"} | {"files": {name: "0" * 64}}
        (run.path / "manifest.json").write_text(json.dumps(sealed(forged)))
        with pytest.raises(LeverError, match="damaged"):
            connect(store)
    shutil.rmtree(run.path)
    (store.path / "runs" / "run=x").symlink_to(tmp_path)
    with pytest.raises(LeverError, match="damaged"):
        connect(store)
    assert store.remove("x") == "x"
    assert (tmp_path / "secret.json").exists()
