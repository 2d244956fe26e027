"""A store behind `gs://` and `az://`: against a stand-in for Google's service, and against
Microsoft's emulator where `npm install -g azurite` put it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lever_data.errors import LeverError
from lever_data.relations.db import connect
from lever_data.store.bucket import Bucket
from lever_data.store.store import Store
from lever_data.store.workplace import BucketWorkplace
from lever_train.options.rollout import Execution
from lever_train.rollout.generate import generate
from tests import azurite, google
from tests.commands import lever
from tests.rollouts import make_world
from tests.stores import candidate, commit, new_store

ROWS = [candidate(q, i, [i + 11], correct=i % 2) for q in range(4) for i in range(3)]


@dataclass(frozen=True)
class _Kind:
    """A cloud: its server, a new bucket in it, and the variable that holds its secret."""

    serve: Callable[[], AbstractContextManager[dict[str, str]]]
    new: Callable[[dict[str, str]], str]
    secret: str


_GOOGLE = _Kind(google.google, google.new_bucket, "GOOGLE_BEARER_TOKEN")
_AZURE = _Kind(azurite.azurite, azurite.new_container, "AZURE_STORAGE_ACCOUNT_KEY")
_absent = pytest.mark.skipif(
    azurite.PROGRAM is None, reason="azurite-blob is not here: npm install -g azurite"
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(_GOOGLE, id="google"),
        pytest.param(_AZURE, id="azure", marks=[pytest.mark.long, _absent]),
    ],
)
def kind(request: pytest.FixtureRequest) -> _Kind:
    found: _Kind = request.param
    return found


@pytest.fixture(scope="module")
def server(kind: _Kind) -> Iterator[dict[str, str]]:
    with kind.serve() as environment:
        yield environment


@pytest.fixture
def uri(
    kind: _Kind, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "machine"))
    return kind.new(server)


@pytest.mark.long
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


@pytest.mark.long
def test_parts_on_two_machines_make_the_bytes_of_one(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    whole = generate(world.request()).run
    for part in ("0/2", "1/2"):
        monkeypatch.setenv("LEVER_CACHE", str(tmp_path / part[0]))
        made = generate(world.request(store=uri), Execution(shard=part)).run
    assert whole is not None and made is not None and made.files == whole.files


@pytest.mark.slow
def test_a_file_in_parts_and_listings_in_pages(uri: str, tmp_path: Path) -> None:
    """A file above 5 MB goes up in parts; Google's stand-in lists three keys a page."""
    bucket, file = Bucket(uri), tmp_path / "big"
    file.write_bytes(bytes(range(256)) * 50_000)
    keys = [f"runs/run=a/t{n}/part-00000.parquet" for n in range(7)]
    for key in keys:
        assert bucket.create(key, b"")
    assert bucket.swap(keys[0], b"other", None) is None
    bucket.upload(f"big/{file.name}", file, "its sha256")
    assert bucket.sha256("big/big") == "its sha256" and bucket.size("big/big") == 12_800_000
    assert b"".join(bucket.chunks("big/big", 12_800_000)) == file.read_bytes()
    assert [found.key for found in bucket.objects("runs")] == keys
    assert bucket.folders() == {"big", "runs"}
    bucket.delete([*keys, "big/not-here"])
    assert bucket.objects("runs") == []


@pytest.mark.slow
def test_a_refusal_is_one_line_without_secrets(
    kind: _Kind, uri: str, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kind.secret, "d3Jvbmc=")
    done = lever("runs", "--store", uri, check=False)
    assert done.returncode == 1 and "may the credentials of the environment list" in done.stderr
    missing = f"{uri.rpartition('/a/')[0]}-not-here/a/store"
    monkeypatch.setenv(kind.secret, server[kind.secret])
    found = lever("runs", "--store", missing, check=False)
    assert found.returncode == 1 and "make the bucket first" in found.stderr
    assert server[kind.secret] not in done.stderr + found.stderr
