"""Several processes at one store: writers of the same and of different sources, readers, rm."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from lever_data import connect
from lever_data.errors import LeverError
from lever_data.relations.db import open_session
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.staging import sweep
from lever_data.store.store import RunSpec, Store
from tests.cases import long
from tests.torture.conftest import Report
from tests.torture.harness import (
    SIZES,
    Snapshot,
    command,
    lever,
    verify,
    verify_swept,
    write_rl_data,
)

QUERIES = 400
ROWS = 5 * QUERIES
ACCEPTED = ("is missing", "no such run", "removed meanwhile", "changed under it")


def _ingest_words(source: Path, store: Path, dataset: str) -> list[str]:
    words = ("ingest", source, "--store", store, "--dataset", dataset, "--split", "train")
    return command(*words)


def _alone(tmp_path: Path, sources: dict[str, Path]) -> Snapshot:
    """What a store holds whose sources were ingested one after another."""
    store = Store.create(tmp_path / "alone")
    for name, source in sources.items():
        list(ingest([source], store, IngestOptions(dataset=name, split="train")))
    return verify(store.path)


@pytest.mark.long
@pytest.mark.parametrize("long", SIZES)
def test_processes_ingest_the_same_and_different_sources_at_once(
    tmp_path: Path, report: Report, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        n: write_rl_data(tmp_path / f"{n}.json", QUERIES, seed=i) for i, n in enumerate("ab")
    }
    expected = _alone(tmp_path, sources)
    rounds = 25 if long else 1
    for number in range(rounds):
        store = tmp_path / f"store{number}"
        words = [_ingest_words(sources[n], store, n) for n in "aabb"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(w, **pipes) for w in words]  # type: ignore[call-overload]
        for process in started:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
        assert verify(store) == expected
        sweep(store / "staging")
        verify_swept(store)
        found = duckdb.connect()
        monkeypatch.chdir(store)
        found.execute((store / "views.sql").read_text("utf-8"))
        assert found.execute("select count(*) from all_candidates").fetchall() == [(2 * ROWS,)]
    report(f"{rounds} rounds of four processes")


@pytest.mark.long
@pytest.mark.parametrize("long", SIZES)
def test_readers_see_whole_runs_while_runs_come_and_go(
    tmp_path: Path, report: Report, long: bool
) -> None:
    sources = [write_rl_data(tmp_path / f"{i}.json", QUERIES, seed=i) for i in range(3)]
    store = Store.create(tmp_path / "store")
    kept = next(iter(ingest(sources[:1], store, IngestOptions(dataset="kept", split="train")))).run
    stop = threading.Event()
    seen: Counter[str] = Counter()
    unexpected: list[str] = []

    def write(number: int) -> None:
        while not stop.is_set():
            options = IngestOptions(dataset=f"other{number}", split="train")
            run = next(iter(ingest([sources[number]], Store.open(store.path), options))).run
            seen["ingests"] += 1
            Store.open(store.path).remove(run.run)

    def read() -> None:
        while not stop.is_set():
            kind = _read(store.path, kept.run)
            seen[kind] += 1
            if kind not in ("whole", "refused"):
                unexpected.append(kind)

    threads = [threading.Thread(target=write, args=(i,)) for i in (1, 2)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    wanted = 200 if long else 4
    _until(lambda: min(seen["whole"], seen["ingests"]) >= wanted, threads, stop)
    assert not unexpected
    assert list(verify(store.path)) == [kept.run]
    report(f"{dict(seen)}")


def _read(path: Path, kept: str) -> str:
    """Count rows once; a store that changed between looking and reading may refuse, clearly."""
    assert _count(path, kept) == ROWS
    try:
        rows = _count(path)
    except (LeverError, duckdb.IOException) as error:
        return "refused" if _is_clear(str(error)) else str(error)
    return "whole" if rows % ROWS == 0 else f"{rows} rows"


def _count(path: Path, *runs: str) -> int:
    session = open_session(path, runs=runs, only=["all_candidates"])
    rows: int = session.con.execute("select count(*) from all_candidates").fetchall()[0][0]
    return rows


def _is_clear(text: str) -> bool:
    return any(part in text for part in (*ACCEPTED, "No such file", "No files found"))


def _until(
    enough: Callable[[], bool], threads: list[threading.Thread], stop: threading.Event
) -> None:
    """Let the threads work until it is enough, or one has died."""
    for thread in threads:
        thread.start()
    while not enough() and all(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("remove", [True, long(False)], ids=["rm", "ingest"])
def test_a_reader_that_has_begun_is_not_disturbed(tmp_path: Path, remove: bool) -> None:
    store = Store.create(tmp_path / "store")
    source = write_rl_data(tmp_path / "a.json", 4_000)
    run = next(iter(ingest([source], store, IngestOptions(dataset="d", split="train")))).run
    con = connect(store)
    read = "select query_id, pointer, score from all_candidates"
    batches = con.sql(read).to_arrow_reader(512)
    rows = next(batches).num_rows
    if remove:
        store.remove(run.run)
    else:
        other = write_rl_data(tmp_path / "b.json", 100, seed=1)
        assert [
            r.is_new for r in ingest([other], store, IngestOptions(dataset="d", split="train"))
        ] == [True]
    rows += sum(batch.num_rows for batch in batches)
    assert rows == 20_000


@pytest.mark.long
def test_a_lock_of_a_stopped_writer_holds_nobody_up_for_ever(tmp_path: Path) -> None:
    """Only the brief lock on staging/ is shared: a writer in the middle of a run blocks no one."""
    store = Store.create(tmp_path / "store")
    source = write_rl_data(tmp_path / "a.json", 20)
    with store.begin(RunSpec("rl_data", "slow", "train", source_sha256="x")):
        done = lever("ingest", source, "--store", store.path, "--dataset", "d", "--split", "train")
        assert done.returncode == 0, done.stderr
        listed = lever("runs", "--store", store.path, "--json", "-")
        assert [r["dataset"] for r in json.loads(listed.stdout)] == ["d"]
