"""A store behind `az://`, against Microsoft's emulator: `npm install -g azurite` first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lever_data.errors import LeverError
from lever_data.relations.db import connect
from lever_data.store.bucket import Bucket
from lever_data.store.store import Store
from lever_data.store.workplace import BucketWorkplace
from lever_train.options.rollout import Execution
from lever_train.rollout.generate import generate
from tests.azurite import KEY, PROGRAM, azurite, new_container
from tests.commands import lever
from tests.rollouts import make_world
from tests.stores import candidate, commit, new_store

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(PROGRAM is None, reason="azurite-blob is not here: npm install -g azurite"),
]
ROWS = [candidate(q, i, [i + 11], correct=i % 2) for q in range(4) for i in range(3)]


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with azurite() as environment:
        yield environment


@pytest.fixture
def uri(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "machine"))
    return new_container(server)


def test_runs_are_committed_read_and_removed(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commit(Store.create(uri), ROWS)
    assert run.files == commit(new_store(tmp_path), ROWS).files
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))
    assert connect(uri).sql("select count(*) from all_candidates").fetchall() == [(12,)]
    with pytest.raises(LeverError, match="another run of this id is in the store"):
        commit(Store.create(uri), ROWS[1:])
    monkeypatch.setenv("LEVER_VERIFY", "full")
    lever("check", "--store", uri)
    Store.open(uri).remove(run.run)
    assert Store.open(uri).runs() == []


def test_a_lease_is_held_by_one(uri: str, tmp_path: Path) -> None:
    Store.create(uri)
    here, there = (
        BucketWorkplace(tmp_path / name / "job", tmp_path / name / "answers", Bucket(uri))
        for name in "ab"
    )
    with here.claimed("part-1", wait=False) as mine, there.claimed("part-1", wait=False) as second:
        assert (mine, second) == (True, False)
    with pytest.raises(KeyboardInterrupt), there.claimed("part-1", wait=False) as mine:
        assert mine
        raise KeyboardInterrupt
    with here.claimed("part-1", wait=False) as mine:
        assert mine  # it was given up, and is taken by a put bound to what was read


def test_parts_on_two_machines_make_the_bytes_of_one(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    whole = generate(world.request()).run
    for part in ("0/2", "1/2"):
        monkeypatch.setenv("LEVER_CACHE", str(tmp_path / part[0]))
        made = generate(world.request(store=uri), Execution(shard=part)).run
    assert whole is not None and made is not None and made.files == whole.files


def test_a_refusal_is_one_line_without_secrets(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    done = lever("runs", "--store", uri, check=False)
    assert done.returncode == 1 and "may the credentials of the environment list" in done.stderr
    missing = f"{uri.rpartition('/a/')[0]}-not-here/a/store"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    done = lever("runs", "--store", missing, check=False)
    assert done.returncode == 1 and "make the bucket first" in done.stderr
    assert KEY not in done.stderr
