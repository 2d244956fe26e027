"""What servers do to a store in a bucket: kills, errors, slow and cut replies, listings that lag.

Whatever happens, a run is there whole or not at all, the same command goes on, and the user reads
one line without a secret in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import obstore
import pytest

from lever_data.errors import LeverError
from lever_data.relations.db import connect
from lever_data.store.bucket import Bucket, Object
from lever_data.store.store import Store
from tests.cloud import KEY, SECRET, Reply, Request, TestBucket, cut, fail
from tests.commands import lever
from tests.stores import candidate, commit

Start = Callable[..., Any]
ROWS = [candidate(q, i, [i + 11], correct=i % 2) for q in range(4) for i in range(3)]
# A process that has imported everything and forks one that does what each line says.
_FORKS = """
import gc, os, sys
from pathlib import Path
import obstore, boto3
from lever_data.store.store import Store
from tests.stores import commit
from tests.test_bucket_faults import ROWS
gc.freeze()  # or a child would look for cycles in all that, and copy its pages
for line in sys.stdin:
    what, uri, cache = line.split()
    if (child := os.fork()) == 0:
        os.environ["LEVER_CACHE"] = cache
        if what == "commit":
            commit(Store.create(uri), ROWS)
        else:
            for run in Store.open(uri).runs():
                Store.open(uri).remove(run.run)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Starts processes at once, and says how they ended."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def begin(self, what: str, uri: str, machine: Path) -> int:
        """Start one; returns its process id."""
        assert self._process.stdin is not None
        print(what, uri, machine, file=self._process.stdin, flush=True)
        return self._line()

    def end(self) -> int:
        """Wait for it; returns its status, below zero where a signal ended it."""
        return self._line()

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def forks(bucket: TestBucket) -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


def whole(bucket: TestBucket) -> list[str]:
    """The runs of the bucket as their manifests and objects say, read past lever."""
    found = []
    for key in bucket.listed():
        if key.endswith("/manifest.json"):
            manifest = json.loads(bucket.read(key))
            place = key.removesuffix("manifest.json")
            for name, digest in manifest["files"].items():
                assert sha256(bucket.read(f"{place}{name}")).hexdigest() == digest
            found.append(manifest["run"])
    return found


def killed_at(forks: Forks, bucket: TestBucket, what: str, machine: Path, number: int) -> bool:
    """Kill a process at a request, before it (even) or when it was served (odd); False: it was
    done before."""
    started = threading.Event()
    child = 0

    def kill(request: Request, start: Start) -> Reply | None:
        if request.number != number // 2:
            return None
        if number % 2:
            list(bucket.cloud.forward(request, lambda *said: None))
        started.wait()
        os.kill(child, signal.SIGKILL)
        return fail("500 Internal Server Error", "InternalError", start)

    bucket.cloud.calm()
    bucket.cloud.spoil = kill
    child = forks.begin(what, bucket.uri, machine)
    started.set()
    status = forks.end()
    bucket.cloud.calm()
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.long
def test_a_writer_is_killed_at_every_request(
    forks: Forks, bucket: TestBucket, tmp_path: Path
) -> None:
    """There is the run or none; the next writer, here or elsewhere, ends with it."""
    number = 0
    while killed_at(forks, bucket, "commit", tmp_path / f"m{number % 3}", number):
        number += 1
        assert len(whole(bucket)) <= 1
        commit(Store.create(bucket.uri), ROWS)
        assert len(whole(bucket)) == 1
        obstore.delete(bucket.objects, bucket.listed())
    assert number >= 2 * 14
    assert connect(bucket.uri).sql("select count(*) from all_candidates").fetchall() == [(12,)]


@pytest.mark.long
def test_a_remover_is_killed_at_every_request(
    forks: Forks, bucket: TestBucket, tmp_path: Path
) -> None:
    """The run is there whole or nobody sees it, and what is left bars no new one."""
    run, number = commit(Store.create(bucket.uri), ROWS).run, 0
    while killed_at(forks, bucket, "remove", tmp_path / f"m{number % 3}", number):
        number += 1
        assert whole(bucket) in ([], [run])
        assert commit(Store.create(bucket.uri), ROWS).run == run
    assert number >= 2 * 8
    notes = [name for name in bucket.listed() if name.startswith("removed/")]
    assert bucket.listed() == ["lever.json", *notes]


@pytest.mark.long
def test_two_writers_at_once_end_with_one_run(
    bucket: TestBucket, tmp_path: Path, forks: Forks
) -> None:
    """Both have uploaded all parts when both put their manifest."""
    both = threading.Barrier(2)

    def meet(request: Request, start: Start) -> Reply | None:
        if request.method == "PUT" and request.path.endswith("/manifest.json"):
            both.wait(30)
        return None

    bucket.cloud.spoil = meet
    other = Forks()
    forks.begin("commit", bucket.uri, tmp_path / "one")
    other.begin("commit", bucket.uri, tmp_path / "two")
    assert (forks.end(), other.end()) == (0, 0)
    other.close()
    assert len(whole(bucket)) == 1


@contextmanager
def spoiled(bucket: TestBucket, spoil: Callable[[Request, Start], Reply | None]) -> Iterator[None]:
    bucket.cloud.spoil = spoil
    try:
        yield
    finally:
        bucket.cloud.calm()


@pytest.mark.long
def test_errors_and_cut_replies_are_asked_again(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request fails at first: with an error, then in the middle of the body."""
    attempts: dict[str, int] = {}

    def unreliable(request: Request, start: Start) -> Reply | None:
        attempts[str(request)] = attempts.get(str(request), 0) + 1
        if attempts[str(request)] == 1:
            return fail("503 Slow Down", "SlowDown", start)
        if attempts[str(request)] == 2 and request.method == "GET":
            return cut(bucket.cloud.forward(request, start), 50)
        return None

    with spoiled(bucket, unreliable):
        run = commit(Store.create(bucket.uri), ROWS)
    assert whole(bucket) == [run.run]
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))
    with spoiled(bucket, unreliable):
        assert connect(bucket.uri).sql("select count(*) from all_candidates").fetchall() == [(12,)]


@pytest.mark.slow
def test_a_lost_reply_to_the_manifest_is_no_failure(bucket: TestBucket) -> None:
    """It was stored, the connection broke, and the second attempt finds it there."""

    def lose(request: Request, start: Start) -> Reply | None:
        is_first = not any(str(r) == str(request) for r in bucket.cloud.seen[:-1])
        if request.method == "PUT" and request.path.endswith("/manifest.json") and is_first:
            list(bucket.cloud.forward(request, lambda *said: None))
            return fail("500 Internal Server Error", "InternalError", start)
        return None

    with spoiled(bucket, lose):
        run = commit(Store.create(bucket.uri), ROWS)
    assert whole(bucket) == [run.run]


@pytest.mark.long
def test_a_slow_server_is_waited_for(bucket: TestBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that does not answer in time is asked again."""
    from lever_data.store import bucket as module

    monkeypatch.setattr(module, "_TIMEOUT", "500ms")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of a connection of its own")
    hung: set[str] = set()

    def hang(request: Request, start: Start) -> Reply | None:
        if request.method == "GET" and str(request) not in hung:
            hung.add(str(request))
            time.sleep(0.7)
        return None

    commit(Store.create(bucket.uri), ROWS)
    with spoiled(bucket, hang):
        assert len(Store.open(bucket.uri).runs()) == 1


@pytest.mark.slow
def test_a_part_that_is_swept_before_the_manifest_is_put_again(bucket: TestBucket) -> None:
    """By whoever took the writer for dead, or removed the run meanwhile."""

    def sweep(request: Request, start: Start) -> Reply | None:
        if request.method == "PUT" and request.path.endswith("/manifest.json"):
            bucket.cloud.spoil = None
            parts = [key for key in bucket.listed() if key.endswith(".parquet")]
            obstore.delete(bucket.objects, parts[:1])
        return None

    with spoiled(bucket, sweep):
        commit(Store.create(bucket.uri), ROWS)
    assert len(whole(bucket)) == 1


_NOTHING = (
    b'<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false'
    b"</IsTruncated></ListBucketResult>"
)


def lagging(page: bytes) -> Callable[[Request, Start], Reply | None]:
    """Answers every listing with a page of the past."""

    def answer(request: Request, start: Start) -> Reply | None:
        if "list-type=2" not in request.query:
            return None
        start("200 OK", [("Content-Length", str(len(page))), ("Content-Type", "application/xml")])
        return [page]

    return answer


@pytest.mark.slow
def test_a_listing_that_lags_loses_nothing(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(bucket.uri)
    with spoiled(bucket, lagging(_NOTHING)):
        run = commit(store, ROWS)
        assert [r.run for r in store.runs()] == [run.run]
        monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))
        elsewhere = Store.open(bucket.uri)
        assert elsewhere.runs() == []
        assert commit(elsewhere, ROWS).committed_at == run.committed_at
        assert connect(elsewhere).sql("select count(*) from all_candidates").fetchall() == [(12,)]
    assert whole(bucket) == [run.run]


def test_a_removed_run_that_is_still_listed_is_gone(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(bucket.uri)
    commit(store, ROWS)
    page = b""

    def keep(request: Request, start: Start) -> Reply | None:
        nonlocal page
        if "list-type=2" in request.query and "runs" in request.query:
            page = b"".join(bucket.cloud.forward(request, start))
            return [page]
        return None

    with spoiled(bucket, keep):
        store.runs()
    store.remove(store.runs()[0].run)
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))
    with spoiled(bucket, lagging(page)):
        assert Store.open(bucket.uri).runs() == []


@pytest.mark.slow
def test_what_dead_writers_left_is_swept_when_it_is_a_day_old(bucket: TestBucket) -> None:
    store = Store.create(bucket.uri)
    for run, hours in (("dead", 25), ("alive", 23)):
        for name in ("candidates/part-00000.parquet", "queries/part-00000.parquet"):
            bucket.put(f"runs/run={run}/{name}", b"half")
            bucket.age(f"runs/run={run}/{name}", timedelta(hours=hours))
    bucket.put("runs/run=dead/notes.txt", b"mine")
    commit(store, ROWS)
    left = {key.split("/")[1] for key in bucket.listed() if key.endswith(".parquet")}
    assert "run=alive" in left and "run=dead" not in left
    assert "runs/run=dead/notes.txt" in bucket.listed()


def test_the_clock_of_this_machine_does_not_count(
    bucket: TestBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("runs/run=alive/candidates/part-00000.parquet", b"half")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 10 * 86400)
    commit(Store.create(bucket.uri), ROWS)
    assert "runs/run=alive/candidates/part-00000.parquet" in bucket.listed()


def refusal(status: str, code: str) -> Callable[[Request, Start], Reply | None]:
    return lambda request, start: fail(status, code, start)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        ("403 Forbidden", "AccessDenied", "may the credentials of the environment list, read"),
        ("403 Forbidden", "SignatureDoesNotMatch", "SignatureDoesNotMatch"),
        ("403 Forbidden", "RequestTimeTooSkewed", "the clock of this machine is wrong"),
        ("400 Bad Request", "ExpiredToken", "ExpiredToken"),
        ("404 Not Found", "NoSuchBucket", "make the bucket first, or mend its name"),
    ],
)
@pytest.mark.parametrize("command", ["runs", "ingest"])
def test_a_refusal_is_one_line_without_secrets(
    command: str, status: str, code: str, said: str, bucket: TestBucket, tmp_path: Path
) -> None:
    (tmp_path / "rl.json").write_text("{}")
    words: list[object] = ["runs"] if command == "runs" else ["ingest", tmp_path / "rl.json"]
    with spoiled(bucket, refusal(status, code)):
        done = lever(*words, "--store", bucket.uri, check=False)
    assert done.returncode == 1
    assert said in done.stderr and "the bucket cannot be used" in done.stderr
    assert len(done.stderr.splitlines()) == 2  # the error and its hint
    assert KEY not in done.stderr and SECRET not in done.stderr


def test_a_bucket_that_is_not_there(bucket: TestBucket) -> None:
    for command in (["runs"], ["copy", "s3://no-such-bucket-here/x"]):
        store = ["--store", "s3://no-such-bucket-here/x"] if command == ["runs"] else [bucket.uri]
        done = lever(*command, *store, check=False)
        assert done.returncode == 1 and "NoSuchBucket" in done.stderr


def test_a_bucket_without_a_store(bucket: TestBucket) -> None:
    done = lever("runs", "--store", bucket.uri, check=False)
    assert done.returncode == 1
    assert f"there is no store here; at {bucket.uri}" in done.stderr


@pytest.mark.slow
def test_a_newer_store_is_refused(bucket: TestBucket) -> None:
    commit(Store.create(bucket.uri), ROWS)
    bucket.put("lever.json", b'{"format": 3}')
    before = bucket.listed()
    for command in (["runs"], ["query", "select 1"], ["audit"]):
        done = lever(*command, "--store", bucket.uri, check=False)
        said = f"this lever reads store formats up to 2; at {bucket.uri}/lever.json; "
        assert done.returncode == 1 and said in done.stderr
    assert bucket.listed() == before


@pytest.mark.slow
def test_a_run_makes_an_older_store_one_that_older_levers_refuse(bucket: TestBucket) -> None:
    Store.create(bucket.uri)
    bucket.put("lever.json", b'{"format": 1}')
    run = commit(Store.create(bucket.uri), ROWS)
    assert json.loads(bucket.read("lever.json")) == {"format": 2}
    assert Store.open(bucket.uri).runs() == [run]


@pytest.mark.parametrize("other", [b'{"format":2}', b'{"format": 3}'])
def test_two_writers_raise_the_format(
    bucket: TestBucket, monkeypatch: pytest.MonkeyPatch, other: bytes
) -> None:
    """The other one is between our look at the marker and our put."""
    Store.create(bucket.uri)
    bucket.put("lever.json", b'{"format": 1}')
    store, look = Store.open(bucket.uri), Bucket.look

    def look_and_wait(self: Bucket, key: str) -> Object | None:
        found = look(self, key)
        bucket.put("lever.json", other)
        return found

    assert store.mirror is not None
    monkeypatch.setattr(Bucket, "look", look_and_wait)
    if other == b'{"format":2}':
        store.mirror.raise_format(other)
    else:
        with pytest.raises(LeverError, match="marker changed meanwhile"):
            store.mirror.raise_format(b'{"format":2}')
    assert bucket.read("lever.json") == other


@pytest.mark.long
def test_secrets_stay_where_they_are(bucket: TestBucket, tmp_path: Path) -> None:
    """In no object, no file of the cache and no word that is said."""
    commit(Store.create(bucket.uri), ROWS)
    said = "".join(
        lever(command, "--store", bucket.uri).stderr for command in ("runs", "views", "check")
    )
    files = [f.read_bytes() for f in (tmp_path / "machine").rglob("*") if f.is_file()]
    objects = [bucket.read(key) for key in bucket.listed()]
    for secret in (KEY, SECRET):
        assert secret not in said
        assert not any(secret.encode() in data for data in [*files, *objects])


@pytest.mark.long
def test_a_changed_object_is_not_read(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commit(Store.create(bucket.uri), ROWS)
    key = f"runs/run={run.run}/candidates/part-00000.parquet"
    data = bytearray(bucket.read(key))
    data[40] ^= 1
    bucket.put(key, bytes(data))
    assert lever("check", "--store", bucket.uri).returncode == 0  # the copy here is whole
    monkeypatch.setenv("LEVER_VERIFY", "full")
    done = lever("check", "--store", bucket.uri, check=False)
    assert done.returncode == 1 and "its bytes in the bucket are not those" in done.stdout
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path / "another"))
    with pytest.raises(LeverError, match="is not what was committed, in the bucket") as caught:
        connect(bucket.uri)
    assert caught.value.where == f"{bucket.uri}/{key}"
    assert not list((tmp_path / "another").rglob("*.parquet*.part"))


def test_without_a_connection(bucket: TestBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lever_data.store.bucket._RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = lever("runs", "--store", bucket.uri, check=False)
    assert done.returncode == 1
    assert (
        "the bucket cannot be used (" in done.stderr and "the same command goes on" in done.stderr
    )
    assert "127.0.0.1" not in done.stderr.replace(bucket.uri, "")


def test_an_environment_that_does_not_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEVER_CACHE", str(tmp_path))
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    done = lever("runs", "--store", "az://container/x", check=False)
    assert done.returncode == 1 and "Account must be specified" in done.stderr
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", SECRET + "!")
    done = lever("runs", "--store", "az://container/x", check=False)
    assert done.returncode == 1 and "the environment does not say" in done.stderr
    assert SECRET not in done.stderr
