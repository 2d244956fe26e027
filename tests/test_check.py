"""`lever check`: damage is found and named; data tests; the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lever_data.errors import LeverError
from lever_data.report.check import Problem, check, require_sound
from lever_data.store.schema import CANDIDATES, QUERIES
from lever_data.store.store import Run, RunSpec, Store
from tests.cases import long, long_except
from tests.commands import lever
from tests.stores import Row, candidate, commit, new_store, table

GOOD = [candidate(0, 0, [1, 2], correct=1, score=0.6, eval_mode="file")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def only(store: Store) -> Problem:
    (problem,) = check(store).problems
    return problem


def data_file(run: Run) -> Path:
    (path,) = run.table_files("candidates")
    return path


@pytest.mark.slow
def test_a_sound_store(store: Store) -> None:
    commit(store, GOOD)
    report = check(store)
    assert report.problems == ()
    assert (report.num_runs, report.num_files) == (1, 2)
    assert report.num_tests >= 10


@pytest.mark.slow
def test_an_empty_store_is_sound(store: Store) -> None:
    assert check(store).problems == ()


def test_a_changed_byte(store: Store) -> None:
    path = data_file(commit(store, GOOD))
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    problem = only(store)
    assert problem.kind == "file"
    assert problem.what == "its bytes are not those that were committed"
    assert problem.where.endswith("/candidates/part-00000.parquet")


def test_a_missing_and_an_unknown_file(store: Store) -> None:
    path = data_file(commit(store, GOOD))
    path.rename(path.with_name("part-00007.parquet"))
    assert [p.what for p in check(store).problems] == [
        "the manifest does not know this file",
        "the file is missing",
    ]


def test_columns_of_another_type(store: Store) -> None:
    rows = table(CANDIDATES, GOOD)
    odd = rows.set_column(rows.schema.get_field_index("temperature"), "temperature", [["hot"]])
    odd = odd.append_column("mood", [["good"]]).drop_columns(["gen_method", "shot_num"])
    with store.begin(RunSpec("rl_data", "d", "train")) as writer:
        writer.write("candidates", odd)
        writer.commit()
    assert sorted(p.what for p in check(store).problems) == [
        "lever has no column mood",
        "the column shot_num is missing",
        "the column temperature is string, not double",
    ]


BAD_ROWS: dict[str, list[Row]] = {
    "candidate_key_is_unique": [candidate(0, 0, [1]), candidate(0, 0, [2])],
    "pointer_is_well_formed": [{**candidate(0, 0, [1, 2]), "shot_num": 3}],
    "score_is_in_range": [candidate(0, 0, [1], score=1.5)],
    "official_verdict_follows_accuracy": [
        candidate(0, 0, [1], correct=1, score=0.0, eval_mode="file")
    ],
    "eval_mode_is_known": [candidate(0, 0, [1], eval_mode="guess")],
    "failure_earns_nothing": [candidate(0, 0, [1], eval_failed=True, correct=1)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", long_except(BAD_ROWS, "candidate_key_is_unique", "failure_earns_nothing")
)
def test_each_data_test_finds_its_fault(store: Store, name: str) -> None:
    commit(store, BAD_ROWS[name])
    problem = only(store)
    assert (problem.kind, problem.where) == ("test", name)
    assert problem.examples[0]["query_id"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("pointer", [[1, 1], long([-1, 2])])
def test_malformed_pointers(store: Store, pointer: list[int]) -> None:
    commit(store, [candidate(0, 0, pointer)])
    assert only(store).where == "pointer_is_well_formed"


def commit_pool(store: Store, pool: list[int], pointer: list[int], places: list[int]) -> None:
    query = {"dataset": "d", "split": "train", "query_id": 0, "candidate_pool": pool}
    rows = [candidate(0, 0, pointer, pointer_pos=places)]
    with store.begin(RunSpec("rl_data", "d", "train")) as writer:
        writer.write("candidates", table(CANDIDATES, rows))
        writer.write("queries", table(QUERIES, [query]))
        writer.commit()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pointer", "places", "is_sound"),
    [long([7, 5], [2, 0], True), ([7, 9], [2, 0], False), long([7, 5], [0, 2], False)],
)
def test_pointers_and_pools(
    store: Store, pointer: list[int], places: list[int], is_sound: bool
) -> None:
    commit_pool(store, [5, 6, 7], pointer, places)
    expected = [] if is_sound else ["pointer_is_in_pool"]
    assert [p.where for p in check(store).problems] == expected


@pytest.mark.slow
def test_a_candidate_without_its_query(store: Store) -> None:
    with store.begin(RunSpec("rl_data", "d", "train")) as writer:
        writer.write("candidates", table(CANDIDATES, GOOD))
        writer.commit()
    assert only(store).where == "candidate_has_query"


@pytest.mark.long
def test_users_tests(store: Store) -> None:
    commit(store, GOOD)
    folder = store.path / "tests"
    folder.mkdir()
    (folder / "no_beams.sql").write_text(
        "-- Our data has no beams.\nselect query_id from all_candidates where gen_method = 'beam';"
    )
    (folder / "writes.sql").write_text("copy (select 1) to 'x.csv'")
    (folder / "broken.sql").write_text("select nothing from nowhere")
    (folder / "latin.sql").write_bytes(b"select '\xff'")
    found = {p.where: p for p in check(store).problems}
    assert found["no_beams"].what == "1 row fails: Our data has no beams."
    assert found["no_beams"].examples == ({"query_id": 0},)
    assert "only SELECT is allowed" in found["writes"].what
    assert found["broken"].what.startswith("the test does not run: Catalog Error")
    assert found["latin"].what.startswith("the test cannot be read")
    with pytest.raises(LeverError, match="4 problems") as caught:
        require_sound(check(store))
    assert "a test that is wrong" in str(caught.value.hint)


@pytest.mark.long
def test_the_command(store: Store) -> None:
    run = commit(store, GOOD)
    done = lever("check", "--store", store.path)
    assert "checked 1 run, 2 files, 15 tests: 0 problems" in done.stdout
    data_file(run).write_bytes(b"PAR1")
    failed = lever("check", "--store", store.path, "--json", "-", check=False)
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["problems"][0]["kind"] == "file"
    assert "Error: the store has 1 problem" in failed.stderr
    assert "lever runs rm" in failed.stderr
