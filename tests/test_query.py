"""`lever query`: one reading SELECT, in a sandbox whose limits hold."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from itertools import product
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.relations.child import end, start
from lever_data.relations.db import open_session, require_select
from lever_data.relations.forms import FORMS, write
from lever_data.relations.query import FAILED, query, write_query
from lever_data.relations.query_options import QueryOptions
from lever_data.store.spill import new_spill_folder
from lever_data.store.store import Store
from tests.cases import long, long_except
from tests.commands import Done, lever
from tests.stores import candidate, commit, new_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = new_store(tmp_path_factory.mktemp("query"))
    commit(
        made,
        [candidate(q, c, [q + 10, q + c + 11], correct=c) for q in range(5) for c in (0, 1)],
    )
    return made


def _files(store: Store) -> list[str]:
    return sorted(str(p) for p in store.path.rglob("*"))


def _lever(store: Store, *words: str) -> Done:
    return lever("query", "--store", store.path, *words, check=False)


def ask(store: Store, sql: str, form: str) -> str:
    """The result as text of this form."""
    out = io.BytesIO()
    write_query(store.path, sql, form, out)
    return out.getvalue().decode()


WRITES = [
    "copy (select 1) to '{store}/x.csv'",
    "with x as (copy (select 1) to '{store}/x.csv') select 1",
    "explain analyze copy (select 1) to '{store}/x.csv'",
    "select 1; copy (select 1) to '{store}/x.csv'",
    "export database '{store}/x'",
    "attach '{store}/x.db'",
    "create table t as select 1",
    "insert into runs (run) values ('x')",
    "set threads = 1",
    "install httpfs",
    "load json",
    "pragma version",
    "select * from query('copy (select 1) to ''{store}/x.csv''')",
    "select * from read_text('/etc/hostname')",
    "select * from '/etc/hostname'",
    "select * from glob('/*')",
    "",
    ";",
]


@pytest.mark.parametrize("sql", WRITES)
def test_nothing_is_written_and_nothing_outside_is_read(store: Store, sql: str) -> None:
    """What the query's process does with the text, without the process."""
    before = _files(store)
    with (
        closing(open_session(store, only=["runs"]).con) as con,
        pytest.raises((LeverError, duckdb.Error)),
    ):
        con.execute("set lock_configuration = true")
        require_select(con, sql.format(store=store.path))
        con.sql(sql.format(store=store.path)).fetchall()
    assert _files(store) == before


@pytest.mark.slow
@pytest.mark.parametrize("sql", [WRITES[1], long(WRITES[13]), ""])
def test_the_process_refuses_it_too(store: Store, sql: str) -> None:
    before = _files(store)
    with (
        pytest.raises(LeverError),
        query(store.path, sql.format(store=store.path)) as reader,
    ):
        reader.read_all()
    assert _files(store) == before


@pytest.mark.long
def test_a_query_that_takes_too_long_is_killed_on_time(store: Store) -> None:
    endless = "select count(*) from range(1000000000) a, range(1000000) b"
    with (
        pytest.raises(LeverError, match="out of time"),
        query(store.path, endless, QueryOptions(timeout=1.5)) as reader,
    ):
        reader.read_all()


@pytest.mark.long
@pytest.mark.parametrize(
    "sql",
    [
        "select list(range) from range(300000000)",
        "select sum(length(repeat('x', 2000000000 + i))) from range(8) t(i)",
        "select length(string_agg(repeat('x', 1000), '')) from range(3000000)",
    ],
)
def test_a_query_that_takes_too_much_memory_ends(store: Store, sql: str) -> None:
    options = QueryOptions(memory=0.3, timeout=60)
    with (
        pytest.raises(LeverError, match=r"memory|size"),
        query(store.path, sql, options) as reader,
    ):
        reader.read_all()


WIDE = [  # of a wide value: rows that are few, and large in the form that is written
    "select range(2000000) as many",
    "select repeat('x', 1000000 + i) as long from range(150) t(i)",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sql", "form"),
    [
        (WIDE[1], "json"),
        *(long(WIDE[0], form) for form in ("table", "csv", "json")),
        *(long(WIDE[1], form) for form in ("table", "csv")),
    ],
)
def test_the_limits_hold_for_the_form_too(store: Store, sql: str, form: str) -> None:
    """All forms are made in the process that is bounded: this one passes on what it has made."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = io.BytesIO()
    with suppress(LeverError):
        write_query(store.path, sql, form, out, QueryOptions(memory=0.3, timeout=60))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown <= 100_000_000 + 3 * len(out.getvalue())
    if form == "table":
        assert len(out.getvalue()) < 1_000_000


@pytest.mark.slow
def test_a_table_cuts_what_is_long(store: Store) -> None:
    shown = json.loads(ask(store, "select range(1000), repeat('é', 3000), 'nan'::double", "table"))
    many, text, number = shown["rows"][0]
    assert many.startswith("[0, 1, ") and many.endswith("99, …]")
    assert text == "é" * 2000 + "… (3,000 characters)"
    assert number == "nan" and shown["more"] == 0


@pytest.mark.long
def test_a_killed_query_leaves_no_spilled_files(store: Store) -> None:
    """Out of time while it spills: its folder goes with it."""
    spilling = "select md5(a::varchar) as h from range(100000000) t(a) order by h"
    own = new_spill_folder().parent  # others spill, too, beside it
    before = set(own.iterdir())
    with pytest.raises(LeverError, match="out of time"):
        write_query(store.path, spilling, "csv", io.BytesIO(), QueryOptions(memory=0.05, timeout=2))
    assert set(own.iterdir()) <= before


@pytest.mark.slow
@pytest.mark.parametrize("is_asked", [False, True])
def test_the_process_ends_when_nobody_waits_for_it(store: Store, is_asked: bool) -> None:
    """Its parent was killed: before it asked, or in the middle of a query."""
    endless = "select count(*) from range(1000000000) a, range(1000000) b"
    request: dict[str, object] = {"store": str(store.path), "sql": endless, "form": "csv"}
    request |= {"spill": "/none", "runs": [], "sql_dir": None, "memory": 1_000_000_000}
    child = start()
    try:
        assert child.stdin is not None and child.stdout is not None
        if is_asked:
            child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.close()
        assert child.stdout.read() == b""
        assert child.wait() == (FAILED if is_asked else 0)
    finally:
        end(child)


@pytest.mark.slow
def test_what_killed_processes_spilled_is_swept(tmp_path: Path) -> None:
    """By the next process that needs a folder; a live one's stays."""
    code = (
        "import sys; from lever_data.store.spill import new_spill_folder as new\n"
        "folder = new(); folder.mkdir(); (folder / 'x').touch(); print(folder, flush=True)\n"
        "sys.stdin.read()"
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}

    def start() -> tuple[subprocess.Popen[str], Path]:
        words, pipe = [sys.executable, "-c", code], subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=env)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    killed, left = start()
    killed.kill()
    killed.communicate()
    alive, kept = start()
    last, _ = start()
    assert not left.parent.exists() and (kept / "x").exists()
    for process in (alive, last):
        process.communicate()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_unknown_names_get_the_nearest(store: Store) -> None:
    with (
        pytest.raises(UsageError, match="no such view") as caught,
        query(store.path, "select * from beam_sampel") as reader,
    ):
        reader.read_all()
    assert "did you mean beam_sample?" in str(caught.value.hint)


@pytest.mark.slow
def test_the_error_of_a_column_names_the_candidates(store: Store) -> None:
    done = _lever(store, "select vqa_corect from beam")
    assert done.returncode == 1
    assert done.stdout == ""
    assert 'Error: Binder Error: Referenced column "vqa_corect" not found' in done.stderr
    assert "LINE 1" not in done.stderr and "Traceback" not in done.stderr


SUMS = (
    "select query_id, pointer, sum(correct) as n "
    "from candidates where query_id = 1 group by all order by all"
)


@pytest.mark.long
def test_to_a_terminal_or_as_json(store: Store) -> None:
    as_json = _lever(store, SUMS, "--format", "json")
    assert json.loads(as_json.stdout) == [
        {"query_id": 1, "pointer": [11, 12], "n": 0},
        {"query_id": 1, "pointer": [11, 13], "n": 1},
    ]
    assert "[11, 13]" in _lever(store, SUMS).stdout


@pytest.mark.slow
def test_formats(store: Store, tmp_path: Path) -> None:
    as_csv = _lever(store, SUMS, "--format", "csv")
    assert as_csv.stdout == 'query_id,pointer,n\n1,"[11,12]",0\n1,"[11,13]",1\n'
    out = tmp_path / "o.parquet"
    done = _lever(store, SUMS, "--out", str(out))
    assert done.stdout == "" and "wrote 2 rows" in done.stderr
    assert pq.read_table(out).column("pointer").to_pylist() == [[11, 12], [11, 13]]
    (tmp_path / "q.sql").write_text("select count(*) as n from all_candidates")
    done = _lever(store, "--file", str(tmp_path / "q.sql"), "--format", "json")
    assert json.loads(done.stdout) == [{"n": 10}]


TYPES = {
    "numbers": "1::tinyint a, 2::ubigint b, null::int c, 9::hugeint d, 1.25::decimal(10, 2) e, "
    "0.1::float f, 'nan'::double g, -0.0::double h, true i",
    "texts": "'é\n,\"' a, ''::varchar b, '\\x00ab'::blob c, '101'::bit d, uuid() is null e, "
    "'a'::enum('a', 'b') f, '{\"a\": 1}'::json g, null h",
    "times": "date '2020-02-03' a, time '01:02:03.456' b, timestamp '2020-01-02 03:04:05.678' c, "
    "timestamptz '2020-01-02 03:04:05+02' d, timetz '01:02:03+02' e",
    "nanoseconds": "timestamp_ns '2020-01-02 03:04:05.678901234' a",
    "nested": "[1, null] a, {'x': 1, 'y': ['a']} b, map {'k': 1} c, array_value(1, 2) d, "
    "range(300) e, [date '2020-01-01'] f, union_value(num := 2) g, interval 2 days h",
}


WRITTEN = sorted({*product(TYPES, FORMS)} - {("nested", "parquet")})


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    long_except(WRITTEN, ("nanoseconds", "csv"), ("nanoseconds", "parquet")),
    ids="-".join,
)
def test_the_process_writes_what_any_other_would(
    store: Store, case: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports pyarrow without numpy."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # by which processes of tests have no pandas
    (types, form), out, asked = case, io.BytesIO(), io.BytesIO()
    sql = f"select {TYPES[types]} from range(3)"
    with duckdb.connect() as con:
        write(con.sql(sql).to_arrow_reader(10), form, out)
    assert write_query(store.path, sql, form, asked) == 3
    assert asked.getvalue() == out.getvalue()


@pytest.mark.long
def test_an_empty_result_is_still_a_table(store: Store) -> None:
    none = "select query_id from candidates where false"
    assert json.loads(_lever(store, none, "--format", "json").stdout) == []
    assert _lever(store, none, "--format", "csv").stdout == "query_id\n"


@pytest.mark.slow
def test_a_failed_query_leaves_no_file(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "o.csv"
    sql = "select case when i = 99999 then error('late') end from range(100000) t(i)"
    done = _lever(store, sql, "--out", str(out))
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_usage_errors_exit_with_2(store: Store) -> None:
    assert lever("query", "--store", store.path, check=False).returncode == 2
    words = ("query", "--store", store.path, "select 1", "--frmat", "x")
    assert lever(*words, check=False).returncode == 2
    assert _lever(store, "drop view beam").returncode == 2


@pytest.mark.long
def test_ctrl_c_is_named(store: Store) -> None:
    endless = "select sum(hash(a.range + b.range)) from range(1000000) a, range(1000000) b"
    words = ["query", "--store", str(store.path), endless]
    process = subprocess.Popen(
        [sys.executable, "-m", "lever_cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Error: interrupted" in said and "Traceback" not in said


@pytest.mark.long
def test_columns_of_one_name_are_shown_side_by_side_and_never_lost(store: Store) -> None:
    sql = "select 1 as a, 2 as a"
    assert ask(store, sql, "csv") == "a,a\n1,2\n"
    for form in ("json", "parquet"):
        with pytest.raises(UsageError, match="share a name") as caught:
            ask(store, sql, form)
        assert caught.value.value == "a"
    assert "1  2" in _lever(store, sql).stdout


@pytest.mark.parametrize(
    "value", ["date 'infinity'", "timestamp 'infinity'", "date '0044-01-01 (BC)'"]
)
@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_a_value_that_python_has_not_is_an_error_with_its_column(value: str, form: str) -> None:
    with (
        duckdb.connect() as con,
        pytest.raises(LeverError, match="cannot be written") as caught,
    ):
        write(con.sql(f"select {value} as day").to_arrow_reader(10), form, io.BytesIO())
    assert caught.value.where == "column day"
    assert "day::varchar" in str(caught.value.hint)


@pytest.mark.slow
def test_an_error_of_a_form_comes_through(store: Store) -> None:
    done = _lever(store, "select date 'infinity' as day", "--format", "csv")
    assert done.returncode == 1 and "column day" in done.stderr


@pytest.mark.slow
def test_a_type_that_parquet_has_not_is_an_error(store: Store) -> None:
    with pytest.raises(LeverError, match="Parquet has no such type"):
        ask(store, "select interval 1 day as a", "parquet")


@pytest.mark.parametrize("flag", ["--memory", "--timeout"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0"])
def test_a_limit_is_a_positive_number(store: Store, flag: str, value: str) -> None:
    done = lever("query", "--store", store.path, "select 1", flag, value, check=False)
    assert done.returncode == 2
    assert re.search(rf"finite number|greater than 0.*; at {flag}; value", done.stderr)


def test_sql_that_is_not_utf8_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        ask(store, "select '\udcc3'", "csv")
