"""Runs are atomic, immutable and named after their content."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lever_data import connect
from lever_data.errors import LeverError
from lever_data.store import writer
from lever_data.store.files import sha256_file
from lever_data.store.manifest import sealed, to_json
from lever_data.store.schema import CANDIDATES
from lever_data.store.store import RunSpec, Store
from tests.commands import lever
from tests.stores import candidate, commit, new_store, table


def _bytes(store: Store) -> dict[str, str]:
    return {str(p.relative_to(store.path)): sha256_file(p) for p in store.path.rglob("*.parquet")}


def test_a_run_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    spec = RunSpec(kind="rl_data", dataset="d", split="train", source_sha256="a")
    with pytest.raises(RuntimeError), store.begin(spec) as writer:
        writer.write("candidates", table(CANDIDATES, [candidate(0, 0, [1])]))
        raise RuntimeError
    assert store.runs() == []
    assert [p.name for p in (store.path / "staging").iterdir()] == ["lock"]


def test_the_same_content_has_the_same_id_and_bytes(tmp_path: Path) -> None:
    rows = [candidate(q, c, [c, c + 1]) for q in range(50) for c in range(3)]
    one, two = Store.create(tmp_path / "1"), Store.create(tmp_path / "2")
    first = commit(one, rows)
    spec = RunSpec(kind="rl_data", dataset="d", split="train", source_sha256="a")
    with two.begin(spec) as writer:  # the same rows in other batches
        for row in rows:
            writer.write("candidates", table(CANDIDATES, [row]))
        second = writer.commit()
    assert first.run == second.run == spec.run_id()
    name = f"runs/run={first.run}/candidates/part-00000.parquet"
    assert _bytes(one)[name] == _bytes(two)[name]
    for other in (
        RunSpec(kind="rollout", dataset="d", split="train", source_sha256="a"),
        RunSpec(kind="rl_data", dataset="d", split="val", source_sha256="a"),
        RunSpec(kind="rl_data", dataset="d", split="train", source_sha256="b"),
        RunSpec(kind="rl_data", dataset="d", split="train", source_sha256="a", parents=("x",)),
    ):
        assert other.run_id() != spec.run_id()


def test_rows_out_of_order_are_sorted_and_parts_split_between_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP", 16)
    monkeypatch.setattr(writer, "PART_ROWS", 40)
    rows = [candidate(q, c, [c]) for q in (5, 3, 11, 2, 7, 1) for c in range(12)]
    run = commit(new_store(tmp_path), rows)
    files = run.table_files("candidates")
    parts = [pq.read_table(f, partitioning=None) for f in files]
    assert len(parts) > 1
    keys = [
        (q, c)
        for part in parts
        for q, c in zip(part["query_id"].to_pylist(), part["candidate"].to_pylist(), strict=True)
    ]
    assert keys == sorted((r["query_id"], r["candidate"]) for r in rows)
    held = [set(part["query_id"].to_pylist()) for part in parts]
    assert sum(len(queries) for queries in held) == len(set().union(*held))
    assert run.query_range == (1, 11)
    assert run.rows == {"candidates": 72, "queries": 6}


def test_a_table_with_another_schema_is_our_bug(tmp_path: Path) -> None:
    spec = RunSpec(kind="rl_data", dataset="d", split="train")
    with new_store(tmp_path).begin(spec) as writer:
        writer.write("candidates", table(CANDIDATES, [candidate(0, 0, [1])]))
        with pytest.raises(AssertionError):
            writer.write("candidates", pa.table({"query_id": [1]}))


def test_runs_are_found_by_prefix_and_an_unknown_one_lists_what_there_is(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    one = commit(store, [candidate(0, 0, [1])])
    two = commit(store, [candidate(0, 0, [1])], name="b")
    assert store.run(one.run) == one
    with pytest.raises(LeverError, match="several runs begin like this"):
        store.run("rl_data")
    with pytest.raises(LeverError, match="no such run") as caught:
        store.run("x")
    assert one.run in str(caught.value.hint) and two.run in str(caught.value.hint)
    assert [r.run for r in store.select([two.run, one.run, two.run])] == [one.run, two.run]


def test_what_dead_writers_left_is_swept_and_live_ones_are_not(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    dead = store.path / "staging" / "dead"
    dead.mkdir()
    (store.path / "staging" / "dead.lock").touch()
    (store.path / "staging" / "orphan.lock").touch()
    (store.path / "staging" / "removed-x").mkdir()
    spec = RunSpec(kind="rl_data", dataset="d", split="train", source_sha256="live")
    with store.begin(spec) as writer:
        commit(store, [candidate(0, 0, [1])])  # begins, and so sweeps, while the other lives
        writer.write("candidates", table(CANDIDATES, [candidate(0, 0, [1])]))
        writer.commit()
    assert len(store.runs()) == 2
    assert [p.name for p in (store.path / "staging").iterdir()] == ["lock"]


def test_two_writers_of_one_run_end_with_one_run(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    rows = [candidate(0, 0, [1])]
    spec = RunSpec(kind="rl_data", dataset="d", split="train", source_sha256="a")
    ids = []

    def write() -> None:
        with store.begin(spec) as writer:
            writer.write("candidates", table(CANDIDATES, rows))
            ids.append(writer.commit().run)

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids == [spec.run_id()] * 6
    assert [r.run for r in store.runs()] == [spec.run_id()]


def test_removing_a_run_leaves_the_others(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    one = commit(store, [candidate(0, 0, [1])])
    two = commit(store, [candidate(1, 0, [1])], name="b")
    store.remove(one.run)
    assert [r.run for r in store.runs()] == [two.run]
    assert not one.path.exists()


def _forged(text: str) -> str:
    manifest = {**json.loads(text), "files": {"candidates/../../x.parquet": "0"}}
    del manifest["seal"]
    return json.dumps(sealed(manifest))


DAMAGE: dict[str, Callable[[str], str]] = {
    "cut short": lambda text: text[:-40],
    "empty": lambda text: "",
    "another JSON value": lambda text: "[]",
    "too deep": lambda text: "[" * 100_000,
    "another run's": lambda text: json.dumps(sealed({"run": "other"})),
    "a number changed": lambda text: text.replace('"candidates": 1', '"candidates": 2'),
    "no seal": lambda text: text.replace('"seal"', '"sea1"'),
    "a file outside the run": _forged,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_manifest_is_named_and_hides_no_other_run(tmp_path: Path, how: str) -> None:
    store = new_store(tmp_path)
    bad = commit(store, [candidate(0, 0, [1])])
    good = commit(store, [candidate(0, 0, [1])], name="b")
    path = bad.path / "manifest.json"
    path.write_text(DAMAGE[how](path.read_text()))
    with pytest.raises(LeverError, match=f"manifest of run {bad.run} is damaged") as caught:
        store.runs()
    assert str(path) == caught.value.where
    assert f"lever runs rm {bad.run}" in str(caught.value.hint)
    found = store.inventory()
    assert (found.runs, list(found.damaged)) == ([good], [bad.run])
    assert store.select([good.run]) == [good]
    with pytest.raises(LeverError, match="is damaged"):
        store.select([bad.run])
    new = commit(store, [candidate(0, 0, [1])], name="c")
    assert store.remove(bad.run) == bad.run
    assert store.runs() == [good, new]


def test_a_manifest_that_somebody_else_wrote(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    folder = store.path / "runs" / "run=theirs"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"run": "theirs"}')
    with pytest.raises(LeverError, match=r"\(it has no 'seal': lever did not write it\)"):
        store.runs()


def test_text_that_utf8_cannot_hold_is_committed(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    spec = RunSpec(kind="rl_data", dataset="d", split="train", parameters={"1": "x", "10": "y"})
    with store.begin(spec) as writer:
        writer.write("candidates", table(CANDIDATES, [candidate(0, 0, [1])]))
        writer.commit({"top": {"_meta": "half a pair \ud800"}, "shape": (1, 2), "by": {2: 1}})
    assert store.runs()[0].details["top"] == {"_meta": "half a pair \ud800"}


def test_what_a_writer_left_undone_after_its_rename_is_mended(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = commit(store, [candidate(0, 0, [1])])
    script = store.path / "views.sql"
    expected = script.read_bytes()
    script.unlink()
    (store.path / "staging" / "new-views.sql").write_text("half a file")
    Store.create(store.path)
    assert script.read_bytes() == expected
    commit(store, [candidate(0, 0, [1])], name="b")
    assert [p.name for p in (store.path / "staging").iterdir()] == ["lock"]
    os.utime(script, (1, 1))
    script.write_text("of before the commit")
    os.utime(script, (1, 1))
    Store.create(store.path)
    assert script.read_bytes() == expected
    assert run in store.runs()


def test_a_newer_store_format_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    (store.path / "lever.json").write_text('{"format": 99}')
    with pytest.raises(LeverError, match="store formats up to 2"):
        Store.open(store.path)


def test_a_run_makes_an_older_store_one_that_older_levers_refuse(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    marker = store.path / "lever.json"
    marker.write_text('{"format": 1}')
    assert Store.create(store.path).runs() == [] and json.loads(marker.read_bytes())["format"] == 1
    run = commit(store, [candidate(0, 0, [1])])
    assert json.loads(marker.read_bytes()) == {"format": 2}
    assert Store.open(store.path).runs() == [run]


def test_a_run_of_a_newer_lever_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    newer, known = (commit(store, [candidate(q, 0, [1])], name=str(q)) for q in (0, 1))
    manifest = json.loads((newer.path / "manifest.json").read_bytes())
    manifest = {k: v for k, v in manifest.items() if k != "seal"} | {"schema_version": 3}
    (newer.path / "manifest.json").write_bytes(to_json(sealed(manifest)))
    done = lever("audit", "--store", store.path, check=False)
    assert done.returncode == 1 and done.stderr.startswith("Error: a newer lever (")
    assert "wrote this run: schema 3, and this one reads up to 2; at " in done.stderr
    assert newer.run in done.stderr and "name other runs with --run" in done.stderr
    assert store.select([known.run]) == [known]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeverError, match="cannot be written"):
        Store.create(tmp_path / "file" / "store")


def test_a_full_disk_commits_nothing_and_says_so(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    store = new_store(tmp_path)
    spec = RunSpec(kind="rl_data", dataset="d", split="train", source_sha256="a")
    with pytest.raises(LeverError, match="nothing was committed"), store.begin(spec) as writer:
        writer.write("candidates", table(CANDIDATES, [candidate(0, 0, [1])]))
        (writer.folder / "candidates" / "part-00000.parquet").symlink_to("/dev/full")
        writer.commit()
    assert store.runs() == []


@pytest.mark.parametrize("name", ["a*b", "a?b", "[a]", "x=1"])
def test_a_path_that_duckdb_reads_as_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LeverError, match="may not hold"):
        Store.create(tmp_path / name)
    assert not (tmp_path / name).exists()
    moved = new_store(tmp_path).path.rename(tmp_path / name)
    with pytest.raises(LeverError, match="may not hold"):
        connect(moved)


def test_a_run_is_removed_from_a_copy_without_empty_folders(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    run = commit(store, [candidate(0, 0, [1])])
    shutil.rmtree(store.staging_folder)
    store.remove(run.run)
    assert store.runs() == []


def test_a_run_that_another_process_removed_first_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path)
    run = commit(store, [candidate(0, 0, [1])])
    inventory = store.inventory()
    store.remove(run.run)
    monkeypatch.setattr(Store, "inventory", lambda _: inventory)
    with pytest.raises(LeverError, match="somebody else removed it"):
        store.remove(run.run)
