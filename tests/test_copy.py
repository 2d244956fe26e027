"""`lever copy` moves runs between folders and buckets, whole; what is there is not sent again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import obstore
import pyarrow.parquet as pq
import pytest
import yaml

from lever_data.relations.db import connect
from lever_data.store.store import Store
from tests.cloud import TestBucket
from tests.commands import lever
from tests.stores import candidate, commit, commit_examples, new_store

TEXT = "select count(*) as n from all_candidates"
PICTURE = hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two runs, and a view and a picture of the user's."""
    store = new_store(tmp_path)
    commit(store, [candidate(0, i, [i + 11], correct=1) for i in range(3)])
    commit_examples(
        store,
        [
            {
                "dataset": "d",
                "split": "train",
                "example_id": 1,
                "question_id": 7,
                "question": "why?",
                "answers": ["so"],
            }
        ],
    )
    for folder, name in (("views", "mine.sql"), ("images", PICTURE)):
        (store.path / folder).mkdir()
        (store.path / folder / name).write_text(TEXT)
    return store


def _runs(path: Path) -> dict[str, bytes]:
    """Every file of every run."""
    runs = path / "runs"
    return {str(f.relative_to(runs)): f.read_bytes() for f in runs.rglob("*") if f.is_file()}


@pytest.mark.slow
def test_a_copy_is_the_store(store: Store, tmp_path: Path) -> None:
    done = lever("copy", store.path, tmp_path / "new", "--json", "-")
    assert [one["is_new"] for one in json.loads(done.stdout)] == [True, True]
    assert _runs(tmp_path / "new") == _runs(store.path)
    assert connect(tmp_path / "new").sql("from mine").fetchall() == [(3,)]
    assert (tmp_path / "new" / "images" / PICTURE).exists()
    again = lever("copy", store.path, tmp_path / "new", "--json", "-")
    assert [one["is_new"] for one in json.loads(again.stdout)] == [False, False]


@pytest.mark.long
def test_through_a_bucket_and_back(
    store: Store, bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lever("copy", store.path, bucket.uri)
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))
    lever("copy", bucket.uri, tmp_path / "back")
    assert _runs(tmp_path / "back") == _runs(store.path)
    assert (tmp_path / "back" / "images" / PICTURE).read_text() == TEXT
    assert connect(tmp_path / "back").sql("from mine").fetchall() == [(3,)]


def test_one_run_by_its_prefix(store: Store, tmp_path: Path) -> None:
    lever("copy", store.path, tmp_path / "new", "--run", "rl_data")
    assert [run.kind for run in Store.open(tmp_path / "new").runs()] == ["rl_data"]
    assert not (tmp_path / "new" / "views").exists()


@pytest.mark.long
def test_half_a_copy_in_a_bucket_is_said_and_completed(store: Store, bucket: TestBucket) -> None:
    lever("copy", store.path, bucket.uri)
    (lost,) = [key for key in bucket.listed() if key.endswith("/candidates/part-00000.parquet")]
    obstore.delete(bucket.objects, [lost])
    done = lever("check", "--store", bucket.uri, check=False)
    assert done.returncode == 1
    assert f"{bucket.uri}/{lost}" in done.stdout and "is missing in the bucket" in done.stdout
    lever("copy", store.path, bucket.uri)
    lever("--verify", "full", "check", "--store", bucket.uri)


def test_other_bytes_of_the_same_run_are_refused(store: Store, tmp_path: Path) -> None:
    other = Store.create(tmp_path / "other")
    commit(other, [candidate(0, 0, [12], correct=1)])
    before = _runs(other.path)
    done = lever("copy", store.path, other.path, check=False)
    assert done.returncode == 1
    assert "another run of this id is there, with other bytes" in done.stderr
    assert _runs(other.path) == before


def test_a_damaged_run_is_not_copied(store: Store, tmp_path: Path) -> None:
    file = store.runs()[0].table_files("candidates")[0]
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    done = lever("copy", store.path, tmp_path / "new", check=False)
    assert done.returncode == 1 and "is not what was committed" in done.stderr
    assert not list((tmp_path / "new").glob("runs/*"))


def test_a_store_is_not_copied_onto_itself(store: Store) -> None:
    done = lever("copy", store.path, store.path, check=False)
    assert done.returncode == 1 and "the two are one store" in done.stderr


def test_the_card_says_where_the_tables_are(store: Store, tmp_path: Path) -> None:
    new = tmp_path / "new"
    lever("copy", store.path, new)
    configs = yaml.safe_load((new / "README.md").read_text().split("---\n")[1])["configs"]
    assert [c["config_name"] for c in configs] == ["candidates", "examples", "queries"]
    for config in configs:
        for files in config["data_files"]:
            assert files["split"] == "train"
            found = [str(p) for pattern in files["path"] for p in new.glob(pattern)]
            assert pq.ParquetDataset(found).read().num_rows > 0
    shutil.copytree(new, tmp_path / "hub" / "copy")  # it names no place
    (new / "README.md").write_text("my own")
    done = lever("copy", store.path, new)
    assert (new / "README.md").read_text() == "my own" and "README.md is not lever's" in done.stderr


def test_datasets_reads_a_copy(store: Store, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")  # in the extra `bench`
    lever("copy", store.path, tmp_path / "new")
    rows = datasets.load_dataset(str(tmp_path / "new"), cache_dir=str(tmp_path / "cache"))
    assert rows["train"].num_rows == 3
    rows = datasets.load_dataset(str(tmp_path / "new"), "examples", cache_dir=str(tmp_path / "c"))
    assert rows["train"]["example_id"] == [1]
