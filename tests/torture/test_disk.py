"""A full disk, a limit on file sizes, a read-only store: a clear error, nothing half committed.

Tests may run as root, for whom permissions prove nothing; so the store lies on a small tmpfs, or
is mounted read-only, in a mount namespace of the commands' own.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Store
from tests.cases import long_except
from tests.torture.conftest import Report
from tests.torture.harness import (
    SIZES,
    Nursery,
    Outcome,
    is_clear,
    needs_mounts,
    verify,
    verify_swept,
    write_rl_data,
)

MODULES = (
    "lever_data.sources.ingest",
    "lever_data.relations.db",
    "lever_data.relations.query",
    "lever_data.sources.export",
)
SIZE = 4 << 20


def _ingest(nursery: Nursery, source: Path, store: Path, **limits: int) -> Outcome:
    words = ("ingest", source, "--store", store, "--dataset", "d", "--split", "train")
    return nursery.run(*words, **limits)  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize("long", SIZES)
@pytest.mark.parametrize("shuffled", long_except([False, True], True), ids=["in order", "shuffled"])
def test_a_full_disk_commits_nothing(
    tmp_path: Path, report: Report, shuffled: bool, long: bool
) -> None:
    needs_mounts()
    first = write_rl_data(tmp_path / "first.json", 40, seed=1)
    source = write_rl_data(tmp_path / "second.json", 5_000 if long else 600, shuffled=shuffled)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={SIZE} tmpfs {disk}"
    seen: Counter[str] = Counter()
    with Nursery(tmp_path, *MODULES, mount=mount) as nursery:
        assert _ingest(nursery, first, disk / "s").code == 0
        inside = nursery.sees(disk)
        before = verify(inside / "s")
        assert _ingest(nursery, source, disk / "s").code == 0
        after = verify(inside / "s")
        needed = shutil.disk_usage(inside).used
        new = next(iter(after.keys() - before.keys()))
        for step in range(tries := 80 if long else 4):
            assert nursery.run("runs", "rm", new, "--store", disk / "s").code == 0
            room = needed * 4 * step // tries
            outcome = _in_little_room(nursery, inside, room, source, disk / "s")
            left = verify(inside / "s")
            assert left in (before, after)
            assert outcome.code == 0 or is_clear(outcome), outcome.stderr
            assert outcome.code == 1 or left == after
            seen["refused" if outcome.code else "done"] += 1
            assert _ingest(nursery, source, disk / "s").code == 0
            assert verify(inside / "s") == after
        assert nursery.run("runs", "rm", new, "--store", disk / "s").code == 0
        assert _ingest(nursery, source, disk / "s").code == 0  # its begin sweeps
        verify_swept(inside / "s")
    report(f"{seen.total()} disks of different size, {seen['refused']} too small")
    assert seen["refused"] and seen["done"]


def _in_little_room(
    nursery: Nursery, inside: Path, room: int, source: Path, store: Path
) -> Outcome:
    """Ingest where ``room`` bytes are free."""
    filler = inside / "filler"
    filler.write_bytes(bytes(max(shutil.disk_usage(inside).free - room, 0)))
    try:
        return _ingest(nursery, source, store)
    finally:
        filler.unlink()


@pytest.mark.long
@pytest.mark.parametrize("shuffled", long_except([False, True], True), ids=["in order", "shuffled"])
def test_a_limit_on_file_sizes_commits_nothing(
    tmp_path: Path, nursery: Nursery, report: Report, shuffled: bool
) -> None:
    source = write_rl_data(tmp_path / "a.json", 2_000, shuffled=shuffled)
    store = tmp_path / "s"
    assert _ingest(nursery, source, tmp_path / "whole").code == 0
    largest = max(p.stat().st_size for p in (tmp_path / "whole").rglob("*.parquet"))
    limits = [0, 10, 1_000, 4_000, largest // 8, largest // 2, largest - 1]
    for limit in limits:
        outcome = _ingest(nursery, source, store, file_limit=limit)
        assert outcome.code == 1
        # a limit below the error's own length cuts the error short too
        assert limit < 1_000 or is_clear(outcome), outcome.stderr
        assert not (store / "runs").exists() or verify(store) == {}
    assert _ingest(nursery, source, store).code == 0
    assert len(verify(store)) == 1
    verify_swept(store)
    report(f"{len(limits)} limits")


@pytest.mark.long
def test_a_read_only_store_is_read_and_not_written(tmp_path: Path) -> None:
    needs_mounts()
    store = Store.create(tmp_path / "s")
    sources = [write_rl_data(tmp_path / f"{i}.json", 50, seed=i) for i in range(2)]
    run = next(ingest(sources[:1], store, IngestOptions(dataset="d", split="train"))).run
    before = verify(store.path)
    mount = f"mount --bind {store.path} {store.path} && mount -o remount,ro,bind {store.path}"
    where = ("--store", store.path)
    with Nursery(tmp_path, *MODULES, mount=mount) as nursery:
        count = nursery.run("query", "select count(*) as n from beam", *where, "--format", "json")
        assert (count.code, json.loads(count.stdout)) == (0, [{"n": 250}])
        assert nursery.run("runs", *where).code == 0
        assert nursery.run("views", *where).code == 0
        assert nursery.run("check", *where).code == 0
        out = tmp_path / "back.json"
        assert nursery.run("export", *where, "--run", run.run, "--out", out).code == 0
        assert json.loads(out.read_bytes()) == json.loads(sources[0].read_bytes())
        again = _ingest(nursery, sources[0], store.path)
        assert (again.code, "already ingested" in again.stderr) == (0, True)
        for outcome in (
            _ingest(nursery, sources[1], store.path),
            nursery.run("runs", "rm", run.run, *where),
            nursery.run("export", *where, "--run", run.run, "--out", store.path / "x.json"),
        ):
            assert is_clear(outcome), outcome.stderr
            assert "Read-only file system" in outcome.stderr
    assert verify(store.path) == before
