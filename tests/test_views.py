"""The views: their headers, their rows against counts in plain Python, and the user's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import duckdb
import pytest

from lever_data import catalog, connect
from lever_data.catalog import builtin, documented_columns
from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import open_session
from lever_data.report import views
from lever_data.report.views import list_views, view_sql
from lever_data.store.store import Store
from tests.stores import candidate, commit, new_store

ROWS = [
    candidate(0, 0, [1, 2], correct=1, score=0.6, eval_mode="file"),
    candidate(0, 1, [2, 1], correct=0, score=0.0, eval_mode="fallback"),
    candidate(0, 2, [3, 4], correct=0, gen_method="sample", eval_mode="file"),
    candidate(1, 0, [5, 2], correct=1, score=0.6, eval_mode=None),
    candidate(1, 1, [4, 2], correct=1, score=0.3, gen_method="random"),
    candidate(2, 0, [1, 5], gen_method="retrieval", eval_mode="file"),
    candidate(2, 1, [1, 3], gen_method="beam", eval_mode="file", eval_failed=True, error="boom"),
    candidate(3, 0, [5], correct=0, score=0.0, gen_method="sample", eval_mode="file"),
]


def _keys(con: duckdb.DuckDBPyConnection, view: str) -> list[tuple[int, int]]:
    return con.execute(f"select query_id, candidate from {view} order by all").fetchall()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    """All relations of a store without runs."""
    return connect(new_store(tmp_path_factory.mktemp("empty")))


@pytest.mark.parametrize("name", sorted(builtin()))
def test_the_header_says_what_describe_says(empty: duckdb.DuckDBPyConnection, name: str) -> None:
    relation = builtin()[name]
    described = [
        (row[0], row[1].lower().replace('"', ""))
        for row in empty.execute(f"describe {name}").fetchall()
    ]
    assert described == [(c.name, c.type) for c in documented_columns(relation)]
    assert relation.purpose and relation.grain.startswith("one row")


@pytest.mark.slow
def test_training_views_row_by_row(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, ROWS)
    con = connect(store)
    assert _keys(con, "candidates") == [(r["query_id"], r["candidate"]) for r in ROWS]
    assert (2, 1) not in _keys(con, "all_candidates")  # failed evaluations leave
    assert _keys(con, "beam") == [(0, 0), (0, 1), (1, 0)]
    assert _keys(con, "beam_sample") == [(0, 0), (0, 1), (0, 2), (1, 0), (3, 0)]
    assert _keys(con, "beam_file_only") == [(0, 0), (1, 0)]  # an unknown mode stays
    assert _keys(con, "beam_sample_file_only") == [(0, 0), (0, 2), (1, 0), (3, 0)]
    assert (0, 1) not in _keys(con, "all_candidates_file_only")
    assert _keys(con, "balanced") == [(0, 0), (0, 1), (0, 2)]
    right = con.execute("select query_id from all_candidates where correct = 1").fetchall()
    assert {query for query, _ in _keys(con, "positive")} == {query for (query,) in right}
    assert _keys(con, "learnable") == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def _newer(**columns: Any) -> list[dict[str, Any]]:
    return [candidate(0, 0, [1, 2], correct=0, **columns), candidate(9, 0, [1], correct=0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "rows"),
    [
        (None, None, 9),  # two unknown scorers are the same
        (None, "x", 9),  # unknown equals any
        ("x", None, 9),
        ("x", "x", 9),
        ("x", "y", 10),  # two known scorers are two candidates
    ],
)
def test_of_a_candidate_two_runs_hold_the_newest_counts(
    tmp_path: Path, old: str | None, new: str | None, rows: int
) -> None:
    store = new_store(tmp_path)
    commit(store, [{**r, "scorer": old} for r in ROWS])
    newest = commit(store, _newer(scorer=new), name="b")
    con = connect(store, only=["candidates"])
    assert len(_keys(con, "candidates")) == rows
    held = con.execute(
        "select run from candidates where query_id = 0 and pointer = [1, 2] order by correct"
    ).fetchall()
    assert held[0] == (newest.run,)
    assert len(held) == (2 if rows == 10 else 1)
    alone = connect(store, runs=[newest.run], only=["candidates"])
    assert len(_keys(alone, "candidates")) == 2
    if old != new and old and new:
        chosen = connect(store, scorer=new, only=["candidates"])
        assert len(_keys(chosen, "candidates")) == 2


BETTER = [  # eval_mode of a candidate in the older and the newer run, and whose counts
    ("file", "fallback", "old"),
    ("file", "failed", "old"),
    ("fallback", "failed", "old"),
    (None, "fallback", "old"),  # unknown counts as not string-matched
    ("fallback", "file", "new"),
    ("file", "file", "new"),
    ("file", None, "new"),
    ("failed", "failed", "new"),
]
SCORERS = [(None, None), ("x", "x"), (None, "x"), ("x", None)]


def test_the_better_score_counts_whatever_is_newer(tmp_path: Path) -> None:
    """Each case is a query of its own."""
    store, cases = new_store(tmp_path), list(product(BETTER, SCORERS))
    made = {}
    for which, name in enumerate(("old", "new")):
        rows = []
        for query, (modes, scorers) in enumerate(cases):
            mode, scorer = modes[which], scorers[which]
            is_failed = mode == "failed"
            kept = {"eval_mode": None if is_failed else mode, "eval_failed": is_failed}
            # the repeat inside the run stays beside it, however it is scored
            rows += [candidate(query, i, [100], scorer=scorer, **kept) for i in range(2)]
        made[name] = commit(store, rows, name=name).run
    con = connect(store, only=["candidates"])
    found = con.execute("select query_id, run from candidates order by all").fetchall()
    for query, case in enumerate(cases):
        assert [run for q, run in found if q == query] == [made[case[0][2]]] * 2, case


def test_repeats_inside_one_run_stay(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1, 2]), candidate(0, 1, [1, 2])])
    commit(store, [candidate(0, 0, [7, 8])], name="b")
    assert len(_keys(connect(store, only=["candidates"]), "candidates")) == 3


@pytest.mark.slow
def test_beam_runs_appear_in_beam_infoscore_and_nowhere_else(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    beams = [candidate(5, i, [i, 9], beam_rank=i, info_score=1.0 - i) for i in range(3)]
    commit(store, beams, kind="beam")
    con = connect(store)
    assert _keys(con, "candidates") == []
    assert con.execute("select rank, info_score from beam_infoscore order by 1").fetchall() == [
        (0, 1.0),
        (1, 0.0),
        (2, -1.0),
    ]


@pytest.mark.long
def test_views_sql_gives_any_shell_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path)
    commit(store, ROWS)
    commit(store, _newer(), name="b")
    commit(store, [candidate(5, 0, [1, 9], info_score=1.0)], kind="beam")
    con = connect(store)
    monkeypatch.chdir(store.path)
    with duckdb.connect() as shell:
        shell.execute((store.path / "views.sql").read_text())
        for name in ("candidates", "beam_sample_file_only", "runs", "queries", "beam_infoscore"):
            order = "run, query_id, candidate" if name in ("candidates",) else "all"
            sql = f"select * from {name} order by {order}"
            assert shell.execute(sql).fetchall() == con.execute(sql).fetchall(), name


@pytest.mark.long
def test_the_views_sql_of_a_copied_store_reads_the_copy(tmp_path: Path) -> None:
    """A shell names the script it starts with; the original stays where it is."""
    store = new_store(tmp_path)
    commit(store, ROWS)
    copied = tmp_path / "copied"
    shutil.copytree(store.path, copied)
    commit(Store.open(store.path), _newer(), name="b")
    code = (
        "import duckdb, pathlib, sys; shell = duckdb.connect()\n"
        "shell.execute(pathlib.Path(sys.argv[-1]).read_text())\n"
        "print(shell.execute('select count(distinct run) from candidates').fetchall()[0][0])"
    )

    def runs_seen_by(script: Path | str, folder: Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", code, str(script)]
        return subprocess.run(words, cwd=folder, capture_output=True, text=True)

    assert runs_seen_by("views.sql", copied).stdout == "1\n"
    if duckdb.__version__ >= "2":  # what an older one reads of a command line is nothing
        assert runs_seen_by(copied / "views.sql", tmp_path).stdout == "1\n"
        assert runs_seen_by(store.path / "views.sql", copied).stdout == "2\n"
    refused = runs_seen_by(copied / "views.sql", Path("/")) if duckdb.__version__ < "2" else None
    assert refused is None or "start duckdb in the folder of the store" in refused.stderr


@pytest.mark.long
def test_a_users_view_joins_and_a_broken_one_does_not_break_the_others(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, ROWS)
    folder = store.path / "views"
    folder.mkdir()
    (folder / "zz_base.sql").write_text("select * from beam where correct = 1;")
    (folder / "aa_top.sql").write_text("-- Mine.\nselect * from zz_base")
    (folder / "bad.sql").write_text("select nothing from beam")
    (folder / "writes.sql").write_text("copy beam to 'x.parquet'")
    (folder / "outside.sql").write_text("select * from read_text('/etc/hostname')")
    (folder / "beam.sql").write_text("select 1")
    (folder / "a b.sql").write_text("select 1")
    session = open_session(store)
    assert _keys(session.con, "aa_top") == [(0, 0), (1, 0)]
    assert set(session.broken) == {"bad", "writes", "outside", "beam", "a b"}
    found = {v.name: v for v in list_views(store.path) if v.folder == "user"}
    assert found["aa_top"].rows == 2
    assert "nothing" in str(found["bad"].error)
    with pytest.raises(UsageError) as caught:
        view_sql(store.path, "beem")
    assert "did you mean beam" in str(caught.value.hint)
    assert view_sql(store.path, "beam").startswith("-- Candidates found by beam search.")


@pytest.mark.long
def test_counts_of_the_same_runs_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1])])
    before = list_views(store.path)
    with monkeypatch.context() as patch:
        patch.setattr(views, "share_tables", lambda con: pytest.fail("counted again"))
        assert list_views(store.path) == before
    commit(store, [candidate(1, 0, [2])], name="b")
    counts = {view.name: view.rows for view in list_views(store.path)}
    assert counts["all_candidates"] == 2


@pytest.mark.slow
def test_a_folder_of_views_can_be_named(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, ROWS)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "only_right.sql").write_text("select * from all_candidates where correct = 1")
    con = connect(store, sql_dir=mine)
    assert _keys(con, "only_right") == [(0, 0), (1, 0), (1, 1)]


@pytest.mark.slow
def test_the_connection_reads_the_store_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    con = connect(new_store(tmp_path))
    for sql in (
        f"select * from read_text('{tmp_path}/secret.txt')",
        f"copy (select 1) to '{tmp_path}/x.csv'",
        f"attach '{tmp_path}/x.db'",
        "set enable_external_access = true",
    ):
        with pytest.raises(duckdb.Error):
            con.execute(sql)
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.slow
def test_many_runs_are_one_relation(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for index in range(30):
        commit(store, [candidate(index, 0, [30])], name=str(index))
    con = connect(store, only=["all_candidates"])
    assert con.execute("select count(*) from all_candidates").fetchall() == [(30,)]


def test_what_relations_read_by_their_words_is_what_the_parser_says() -> None:
    known = catalog.builtin().keys() | catalog.RAW_TABLES.keys()
    with duckdb.connect() as con:
        for name, relation in catalog.builtin().items():
            parsed = catalog.tables_read(con, relation.sql) & known
            assert catalog.builtin_reads(name) == parsed, name


@pytest.mark.long
@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from lever_cli.app import command_line; command_line()", "torch duckdb pyarrow polars"),
        ("import lever_data.relations.sandbox", "pydantic pyarrow.compute torch polars"),
        ("import lever_data.report.audit, lever_data.report.verdict", "pyarrow numpy jinja2"),
        (
            "import torch; from lever_train.selector.kinds import ModelConfig, make_selector\n"
            "with torch.device('meta'): make_selector(8, ModelConfig())\n",
            "torch._dynamo duckdb",
        ),
    ],
    ids=["help", "query", "audit", "checkpoint"],
)
def test_a_start_loads_nothing_heavy(code: str, heavy: str) -> None:
    code += f"\nimport sys; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_store_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:

    with pytest.raises(LeverError, match="no store here") as caught:
        Store.open(tmp_path)
    assert "lever ingest" in str(caught.value.hint)


@pytest.mark.slow
def test_views_that_read_each_other_and_a_name_that_is_taken(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1])])
    folder = store.path / "views"
    folder.mkdir(exist_ok=True)
    (folder / "hen.sql").write_text("select * from egg")
    (folder / "egg.sql").write_text("select * from hen")
    (folder / "beam.sql").write_text("select 1 as x")
    broken = open_session(store).broken
    assert broken["hen"] == "it reads egg: broken too, or the views read each other"
    assert broken["egg"].startswith("it reads hen")
    with pytest.raises(LeverError, match=r"which beam\? lever has a relation of this name"):
        open_session(store, only=["beam"])
    assert open_session(store, only=["all_candidates"]).relations
