"""A store in a bucket holds, reads and guarantees what one in a folder does."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch

from lever_data.errors import LeverError, UsageError
from lever_data.relations.db import connect
from lever_data.store.integrity import require_intact
from lever_data.store.mirror import Mirror
from lever_data.store.store import Run, Store
from tests.cloud import KEY, SECRET, TestBucket
from tests.commands import lever
from tests.rollouts import World, make_world
from tests.stores import candidate, commit, new_store

ROWS = [candidate(q, i, [i + 11, 30], score=i / 3, correct=1) for q in range(4) for i in range(3)]


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Go on at another machine: nothing is cached there."""
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))


@pytest.mark.slow
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


@pytest.mark.long
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_removed_run_is_gone_everywhere(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(bucket.uri)
    run = commit(store, ROWS)
    bucket.put(f"runs/run={run.run}/notes.txt", b"mine")
    elsewhere(monkeypatch, tmp_path)
    Store.open(bucket.uri).remove(run.run)
    left = [name for name in bucket.listed() if not name.startswith("removed/")]
    assert left == ["lever.json", f"runs/run={run.run}/notes.txt"]
    assert store.runs() == []
    assert not (store.path / "runs" / f"run={run.run}").exists()
    assert commit(store, ROWS).files == run.files


@pytest.mark.slow
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
    bucket.put_under(f"runs/{key}", b"not ours")
    assert [r.run for r in Store.open(bucket.uri).runs()] == [run.run]


@pytest.mark.parametrize("key", ["runs//manifest.json", "runs/run=../../x/manifest.json"])
def test_a_name_that_is_no_path_is_named(key: str, bucket: TestBucket) -> None:
    Store.create(bucket.uri)
    bucket.put_under(key, b"not ours")
    with pytest.raises(LeverError, match="whose name is no path.*" + re.escape(key)):
        Store.open(bucket.uri).runs()


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    done = lever("runs", "--store", f"s3://{KEY}:{SECRET}@bucket/store", check=False)
    assert done.returncode == 2
    assert "this is not the address of a store in a bucket" in done.stderr
    assert KEY not in done.stderr and "planted" not in done.stderr


def _cached(cache: Path) -> set[str]:
    """The runs whose files lie in a cache."""
    return {path.parents[1].name for path in cache.rglob("*.parquet")}


@pytest.fixture
def two(bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Two runs in a bucket; the machine has room for one and a half."""
    runs = [commit(Store.create(bucket.uri), ROWS, name=name) for name in "ab"]
    elsewhere(monkeypatch, tmp_path)
    size = sum((runs[0].path / name).stat().st_size for name in runs[0].files)
    monkeypatch.setenv("LEVER_CACHE_SIZE", f"{1.5 * size / 1e6:.6f}MB")
    return [Store.open(bucket.uri).run(run.run) for run in runs]


def test_the_run_that_was_read_longest_ago_makes_room(two: list[Run], tmp_path: Path) -> None:
    mirror = Mirror.of(two[0].path.parents[1])
    assert mirror is not None
    for run in (*two, two[0]):
        mirror.fetch([run])
        assert _cached(tmp_path / "another") == {run.path.name}
        mirror.release()


@pytest.mark.long
def test_what_a_live_process_reads_stays(two: list[Run], tmp_path: Path) -> None:
    mirror = Mirror.of(two[0].path.parents[1])
    assert mirror is not None
    mirror.fetch(two[:1])
    code = (
        "import sys; from pathlib import Path; from lever_data.store.store import Store\n"
        "from lever_data.store.integrity import require_intact\n"
        "store = Store.open(sys.argv[1]); require_intact([store.run(sys.argv[2])])"
    )
    words = [sys.executable, "-c", code, mirror.uri]
    refused = subprocess.run([*words, two[1].run], capture_output=True, text=True)
    assert "what is read does not fit into the cache" in refused.stderr
    assert "LEVER_CACHE_SIZE is 0.0" in refused.stderr
    assert _cached(tmp_path / "another") == {two[0].path.name}
    mirror.release()
    subprocess.run([*words, two[1].run], check=True)
    assert _cached(tmp_path / "another") == {two[1].path.name}  # of the dead one nothing is left


def test_a_size_that_is_none(two: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEVER_CACHE_SIZE", "much")
    with pytest.raises(UsageError, match="LEVER_CACHE_SIZE is not a size such as 20GB"):
        require_intact(two)


def test_of_several_at_once_one_fetches_a_file(two: list[Run], bucket: TestBucket) -> None:
    bucket.cloud.calm()
    with ThreadPoolExecutor(4) as pool:
        mirrors = [Mirror(two[0].path.parents[1], bucket.uri) for _ in range(4)]
        list(pool.map(lambda mirror: mirror.fetch(two[:1]), mirrors))
    fetched = [r.path for r in bucket.cloud.seen if r.path.endswith(".parquet")]
    assert len(fetched) == len(set(fetched)) == len(two[0].files)


@pytest.mark.long
def test_the_whole_line_leaves_the_same_bytes(bucket: TestBucket, tmp_path: Path) -> None:
    """Ingest, generate, train, eval and query, in a folder and in a bucket."""
    world = make_world(tmp_path)
    made = [
        _line(world, str(store), tmp_path / out)
        for store, out in ((tmp_path / "disk", "a"), (bucket.uri, "b"))
    ]
    assert made[0] == made[1]


def _line(world: World, store: str, out: Path) -> dict[str, Any]:
    """What the commands make: runs and their files, the checkpoint, accuracies, an answer."""
    lever(
        "ingest",
        world.questions,
        world.annotations,
        "--store",
        store,
        "--dataset",
        "d",
        "--split",
        "train",
    )
    generate = world.argv("--seed", "1")
    generate[generate.index("--store") + 1] = store
    lever(*generate)
    vectors = ("--query-embeddings", world.embeddings)
    small = ("--hidden-dim", "8", "--rce-epochs", "1", "--batch-size", "8")
    lever("train", "--store", store, "--view", "all_candidates", *vectors, *small, "--out", out)
    place = (
        "--store",
        store,
        "--dataset",
        "d",
        "--split",
        "train",
        "--pool",
        world.pool,
        "--limit",
        "8",
    )
    lever(
        "eval",
        *place,
        *vectors,
        "--candidate-embeddings",
        world.embeddings,
        "--checkpoint",
        out / "best.pt",
        "--answerer",
        "nearest",
        "--json",
        f"{out}.json",
    )
    runs = [run for run in Store.open(store).runs() if run.kind != "training"]
    evaluated = json.loads(Path(f"{out}.json").read_text())
    return {
        "runs": {run.run: run.files for run in runs if run.kind != "evaluation"},
        "kinds": [run.kind for run in runs],
        "selector": {
            k: v.tolist()
            for k, v in torch.load(out / "best.pt", weights_only=True)["model_state_dict"].items()
        },
        "rows": evaluated["rows"],
        "answer": lever(
            "query",
            "select * exclude run from all_candidates order by all",
            "--store",
            store,
            "--format",
            "csv",
        ).stdout,
    }


def test_credentials_from_the_files_of_awss_own_tools(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(Store.create(bucket.uri), ROWS)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    done = lever("runs", "--store", bucket.uri, check=False)
    assert done.returncode == 1 and "there are no credentials for this bucket" in done.stderr
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    bucket.cloud.calm()
    assert "rl_data" in lever("runs", "--store", bucket.uri).stdout
    assert KEY in str(bucket.cloud.seen[-1].environ["HTTP_AUTHORIZATION"])


@pytest.mark.long
def test_a_damaged_copy_in_the_cache_is_fetched_anew(bucket: TestBucket) -> None:
    run = commit(Store.create(bucket.uri), ROWS)
    file = run.table_files("candidates")[0]
    data = file.read_bytes()
    damaged = data[:40] + bytes([data[40] ^ 1]) + data[41:]
    file.write_bytes(damaged)
    done = lever("query", "select 1 from candidates", "--store", bucket.uri, check=False)
    assert "is not what was committed" in done.stderr
    assert "Hint: it was a copy in the cache: the same command fetches it anew" in done.stderr
    lever("query", "select 1 from candidates", "--store", bucket.uri)
    file.write_bytes(damaged)
    lever("check", "--store", bucket.uri)
    assert file.read_bytes() == data


@pytest.mark.slow
def test_a_run_that_was_made_again_elsewhere_is_read_as_it_is_now(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another version of pyarrow, say: the same rows in other bytes."""
    here = Store.create(bucket.uri)
    old = commit(here, ROWS)
    with monkeypatch.context() as there:
        elsewhere(there, tmp_path)
        store = Store.open(bucket.uri)
        store.remove(old.run)
        new = commit(store, ROWS[3:])
    assert new.run == old.run and new.files != old.files
    assert connect(here).sql("select count(*) from all_candidates").fetchall() == [(9,)]


@pytest.mark.long
def test_whatever_two_machines_do_both_see_the_same_store(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random commits, removals and deleted caches at either, against a set of names."""
    draw = random.Random(0)
    Store.create(bucket.uri)
    runs: dict[str, str] = {}
    for step in range(60):
        monkeypatch.setenv("LEVER_CACHE", str(tmp_path / f"machine {draw.randrange(2)}"))
        store, name = Store.open(bucket.uri), draw.choice("abc")
        what = draw.choice(["commit", "remove", "read", "read", "lose"])
        if what == "commit":
            runs[name] = commit(store, ROWS, name=name).run
        elif what == "remove" and name in runs:
            store.remove(runs.pop(name))
        elif what == "lose":
            for file in store.path.glob("runs/*/*/*.parquet"):
                file.unlink()
        assert sorted(run.run for run in store.runs()) == sorted(runs.values()), step
        require_intact(store.runs())
