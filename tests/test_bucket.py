"""A store in a bucket holds, reads and guarantees what one in a folder does."""

from __future__ import annotations

import re
from pathlib import Path

import obstore
import pytest

from lever_data.errors import LeverError
from lever_data.relations.db import connect
from lever_data.store.store import Store
from tests.cloud import KEY, SECRET, TestBucket
from tests.commands import lever
from tests.stores import candidate, commit, new_store

ROWS = [
    candidate(q, i, [i + 11, 30], vqa_acc_score=i / 3, vqa_correct=1)
    for q in range(4)
    for i in range(3)
]


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Go on at another machine: nothing is cached there."""
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))


def test_a_run_has_the_bytes_it_has_on_disk(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commit(Store.create(bucket.uri), ROWS)
    disk = commit(new_store(tmp_path), ROWS)
    assert (run.run, run.files) == (disk.run, disk.files)
    assert bucket.listed() == sorted(
        [
            "lever.json",
            f"runs/run={run.run}/manifest.json",
            *(f"runs/run={run.run}/{n}" for n in run.files),
        ]
    )
    for name in run.files:
        assert bucket.read(f"runs/run={run.run}/{name}") == (disk.path / name).read_bytes()
    elsewhere(monkeypatch, tmp_path)
    select = "select * exclude run from all_candidates order by query_id, candidate"
    there, here = (
        connect(path).sql(select).to_arrow_table() for path in (bucket.uri, disk.path.parents[1])
    )
    assert there.equals(here)


def test_only_what_is_read_is_fetched(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commit(Store.create(bucket.uri), ROWS)
    elsewhere(monkeypatch, tmp_path)
    assert lever("runs", "--store", bucket.uri, "--json", "-").stdout.count(run.run) == 1
    assert not list((tmp_path / "another").rglob("*.parquet"))
    said = lever(
        "query",
        "select count(*) as n from all_candidates",
        "--store",
        bucket.uri,
        "--format",
        "csv",
    ).stdout
    assert said.split() == ["n", "12"]
    assert {p.parent.name for p in (tmp_path / "another").rglob("*.parquet")} == {"candidates"}


def test_what_is_there_already_is_not_made_twice(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = commit(Store.create(bucket.uri), ROWS)
    elsewhere(monkeypatch, tmp_path)
    bucket.cloud.calm()
    second = commit(Store.create(bucket.uri), ROWS)
    assert second.committed_at == first.committed_at
    assert not [r for r in bucket.cloud.seen if r.method == "PUT" and "runs" in r.path]


def test_other_bytes_under_the_same_id_are_refused(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commit(Store.create(bucket.uri), ROWS)
    before = {key: bucket.read(key) for key in bucket.listed()}
    elsewhere(monkeypatch, tmp_path)
    with pytest.raises(
        LeverError, match="another run of this id is in the store, with other bytes"
    ):
        commit(Store.create(bucket.uri), ROWS[1:])
    assert {key: bucket.read(key) for key in bucket.listed()} == before
    assert [r.run for r in Store.open(bucket.uri).runs()] == [run.run]


def test_a_removed_run_is_gone_everywhere(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(bucket.uri)
    run = commit(store, ROWS)
    bucket.put(f"runs/run={run.run}/notes.txt", b"mine")
    elsewhere(monkeypatch, tmp_path)
    Store.open(bucket.uri).remove(run.run)
    assert bucket.listed() == ["lever.json", f"runs/run={run.run}/notes.txt"]
    assert store.runs() == []
    assert not (store.path / "runs" / f"run={run.run}").exists()
    assert commit(store, ROWS).files == run.files


def test_the_users_sql_lies_in_the_bucket(bucket: TestBucket) -> None:
    store = Store.create(bucket.uri)
    commit(store, ROWS)
    bucket.put("views/mine.sql", b"select count(*) as n from all_candidates")
    bucket.put("views/.hidden.sql", b"select 1")
    assert connect(bucket.uri).sql("from mine").fetchall() == [(12,)]
    obstore.delete(bucket.objects, ["views/mine.sql"])
    Store.open(bucket.uri)
    assert not list((store.path / "views").iterdir())


@pytest.mark.parametrize(
    "key", ["readme.md", "run=other/a.txt", "run=a", "run=x y/manifest.json", ""]
)
def test_what_is_not_ours_below_runs_bars_nobody(key: str, bucket: TestBucket) -> None:
    run = commit(Store.create(bucket.uri), ROWS)
    bucket.put(f"runs/{key}", b"not ours")
    assert [r.run for r in Store.open(bucket.uri).runs()] == [run.run]


@pytest.mark.parametrize("key", ["runs//manifest.json", "runs/run=../../x/manifest.json"])
def test_a_name_that_is_no_path_is_named(key: str, bucket: TestBucket) -> None:
    Store.create(bucket.uri)
    bucket.put(key, b"not ours")
    with pytest.raises(LeverError, match="whose name is no path.*" + re.escape(key)):
        Store.open(bucket.uri).runs()


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    done = lever("runs", "--store", f"s3://{KEY}:{SECRET}@bucket/store", check=False)
    assert done.returncode == 2
    assert "this is not the address of a store in a bucket" in done.stderr
    assert KEY not in done.stderr and "planted" not in done.stderr
