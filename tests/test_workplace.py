"""What processes share that make one run: entries, claims, answers; in a folder and in a bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lever_data.errors import LeverError
from lever_data.store import workplace as module
from lever_data.store.bucket import Bucket
from lever_data.store.store import Store
from lever_data.store.workplace import LEASE, BucketWorkplace, Workplace
from tests.cloud import Reply, Request, TestBucket, fail
from tests.stores import new_store

LOST = LEASE + timedelta(seconds=1)


@pytest.fixture(params=["folder", "bucket"])
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> list[Workplace]:
    """The workplace of a job as two processes see it; of a bucket, on two machines."""
    if request.param == "folder":
        store = new_store(tmp_path)
        return [Workplace.of(store, "job", store.path / "cache" / "x") for _ in range(2)]
    bucket: TestBucket = request.getfixturevalue("bucket")
    return two(bucket, tmp_path)


def two(bucket: TestBucket, tmp_path: Path) -> list[Workplace]:
    """The workplace of a job in a bucket, on two machines."""
    Store.create(bucket.uri)
    places = [(tmp_path / name / "job", tmp_path / name / "answers") for name in "ab"]
    return [BucketWorkplace(*place, Bucket(bucket.uri)) for place in places]


@pytest.fixture
def one(bucket: TestBucket, tmp_path: Path) -> BucketWorkplace:
    """The workplace of a job in a bucket, on one machine."""
    (found, _) = two(bucket, tmp_path)
    assert isinstance(found, BucketWorkplace)
    return found


def add(place: Workplace, name: str, text: str) -> None:
    made = place.folder / ".made"
    made.mkdir(parents=True)
    (made / "text").write_text(text)
    (made / "more").write_text("")
    place.add(name, made)
    for left in made.glob("*"):
        left.unlink()
    if made.exists():
        made.rmdir()


def text(place: Workplace, name: str) -> str:
    assert name in place.entries()
    (folder,) = place.open([name])
    assert sorted(p.name for p in folder.iterdir()) == ["more", "text"]
    return (folder / "text").read_text()


def test_an_entry_is_seen_by_all(machines: list[Workplace]) -> None:
    here, there = machines
    assert (here.entries(), here.has("part-1")) == (set(), False)
    add(here, "part-1", "one")
    add(there, "part-2", "two")
    assert here.has("part-2") and here.entries() == there.entries() == {"part-1", "part-2"}
    assert [text(p, n) for p in machines for n in ("part-1", "part-2")] == ["one", "two"] * 2
    here.forget("part-1")
    assert there.entries() == {"part-2"}
    add(there, "part-1", "again")
    assert text(here, "part-1") == "again"
    there.remove()
    assert here.entries() == set()


def test_an_entry_that_was_removed_is_named(machines: list[Workplace]) -> None:
    here, there = machines
    add(here, "part-1", "one")
    assert there.entries() == {"part-1"}
    here.remove()
    with pytest.raises(FileNotFoundError):
        (there.open(["part-1"])[0] / "text").read_text()


def test_of_several_one_has_the_claim(machines: list[Workplace]) -> None:
    here, there = machines
    with here.claimed("part-1", wait=False) as mine:
        assert mine
        for place in machines:
            with place.claimed("part-1", wait=False) as second:
                assert not second
        with there.claimed("part-2", wait=False) as other:
            assert other
    with there.claimed("part-1", wait=True) as mine:
        assert mine


def test_who_waits_goes_on_once_it_is_free(machines: list[Workplace]) -> None:
    here, there = machines
    got = []

    def wait() -> None:
        with there.claimed("part-1", wait=True):
            got.append(there.has("part-1"))

    waiting = threading.Thread(target=wait)
    with here.claimed("part-1", wait=False):
        waiting.start()
        add(here, "part-1", "one")
    waiting.join(60)
    assert got == [True]


def shared(place: Workplace, data: bytes) -> str:
    """Pay for answers: a file that is there and shown."""
    place.answers.mkdir(parents=True, exist_ok=True)
    file = place.answers / f"seg-0-{sha256(data).hexdigest()}.arrow"
    file.write_bytes(data)
    place.share(file)
    return file.name


def test_what_one_paid_for_is_there_for_all(machines: list[Workplace]) -> None:
    here, there = machines
    name = shared(here, b"answers")
    there.gather()
    there.gather()
    assert (there.answers / name).read_bytes() == b"answers"
    assert here.entries() == set()


# In a bucket alone: a lease is held by renewing it.


def leases(bucket: TestBucket) -> list[str]:
    return [key for key in bucket.listed() if key.endswith(".lease")]


def test_a_lease_that_was_not_renewed_is_taken_over(bucket: TestBucket, tmp_path: Path) -> None:
    here, there = two(bucket, tmp_path)
    with here.claimed("part-1", wait=False):
        name = shared(here, b"answers")
        bucket.age("jobs/job/part-1.lease", LOST)
        with there.claimed("part-1", wait=False) as mine:
            assert mine
            assert (there.answers / name).exists()  # nothing is paid for twice
            add(there, "part-1", "theirs")
        add(here, "part-1", "slow")
    assert [text(place, "part-1") for place in (here, there)] == ["theirs"] * 2
    assert leases(bucket) == []


def test_who_lost_a_lease_leaves_that_of_another_alone(bucket: TestBucket, tmp_path: Path) -> None:
    here, there = two(bucket, tmp_path)
    slow = here.claimed("part-1", wait=False)
    assert slow.__enter__()
    bucket.age("jobs/job/part-1.lease", LOST)
    with there.claimed("part-1", wait=False) as mine:
        assert mine
        slow.__exit__(None, None, None)
        assert leases(bucket) == ["jobs/job/part-1.lease"]
        with here.claimed("part-1", wait=False) as second:
            assert not second


def test_an_error_gives_the_lease_up_at_once(bucket: TestBucket, tmp_path: Path) -> None:
    """And whoever takes it knows that something may be paid for."""
    here, there = two(bucket, tmp_path)
    with pytest.raises(KeyboardInterrupt), here.claimed("part-1", wait=False):
        name = shared(here, b"answers")
        raise KeyboardInterrupt
    with there.claimed("part-1", wait=False) as mine:
        assert mine and (there.answers / name).exists()


def test_the_clock_of_this_machine_does_not_count(
    bucket: TestBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = two(bucket, tmp_path)
    real = time.time
    with here.claimed("part-1", wait=False):
        for days in (-10, 10):
            monkeypatch.setattr(time, "time", lambda days=days: real() + days * 86400)
            with there.claimed("part-1", wait=False) as mine:
                assert not mine


Start = Callable[..., Any]


@pytest.fixture
def renewals(
    bucket: TestBucket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Semaphore, list[bool]]]:
    """A lease is renewed at once and again; each renewal is counted, and fails while told so."""
    monkeypatch.setattr(module, "LEASE", timedelta(milliseconds=60))
    seen, is_down = threading.Semaphore(0), [False]

    def count(request: Request, start: Start) -> Reply | None:
        if request.method == "PUT" and "HTTP_IF_MATCH" in request.environ:
            seen.release()
            if is_down[0]:
                return fail("403 Forbidden", "AccessDenied", start)
        return None

    bucket.cloud.spoil = count
    yield seen, is_down
    bucket.cloud.calm()


@pytest.mark.slow
def test_a_lease_is_renewed_while_its_owner_lives(
    bucket: TestBucket, one: BucketWorkplace, renewals: tuple[threading.Semaphore, list[bool]]
) -> None:
    seen, is_down = renewals
    with one.claimed("part-1", wait=False):
        first = bucket.read("jobs/job/part-1.lease")
        for down in (True, False):  # what the bucket refuses for a moment is tried again
            is_down[0] = down
            for _ in range(3):
                assert seen.acquire(timeout=60)
        assert bucket.read("jobs/job/part-1.lease") != first
    assert leases(bucket) == []


@pytest.mark.slow
def test_a_lost_reply_to_a_lease_is_no_conflict(bucket: TestBucket, one: BucketWorkplace) -> None:
    """It was stored, the connection broke, and the second attempt finds it there."""

    def lose(request: Request, start: Start) -> Reply | None:
        is_first = not any(str(r) == str(request) for r in bucket.cloud.seen[:-1])
        if request.method == "PUT" and is_first:
            list(bucket.cloud.forward(request, lambda *said: None))
            return fail("500 Internal Server Error", "InternalError", start)
        return None

    bucket.cloud.spoil = lose
    with one.claimed("part-1", wait=False) as mine:
        assert mine
        add(one, "part-1", "one")
    assert text(one, "part-1") == "one"
    assert leases(bucket) == []


def test_what_is_not_ours_below_jobs_bars_nobody(bucket: TestBucket, one: BucketWorkplace) -> None:
    for key in ("readme.md", "part 1.zip", "more/part-1.zip", "part-1"):
        bucket.put(f"jobs/job/{key}", b"not ours")
    bucket.put("jobs/job-2/part-1.zip", b"another job")
    assert one.entries() == set()
    one.remove()
    assert [k for k in bucket.listed() if k.startswith("jobs/")] == ["jobs/job-2/part-1.zip"]


def test_a_damaged_entry_is_named(bucket: TestBucket, one: BucketWorkplace) -> None:
    add(one, "part-1", "some text")
    data = bytearray(bucket.read("jobs/job/part-1.zip"))
    data[data.index(b"some text")] ^= 1
    for damaged in (bytes(data), b"short"):
        bucket.put("jobs/job/part-1.zip", damaged)
        one.entries()
        with pytest.raises(LeverError, match="a finished part of the job cannot be read") as caught:
            one.open(["part-1"])
        assert caught.value.where == f"{bucket.uri}/jobs/job/part-1.zip"


def test_a_file_of_answers_that_is_not_what_it_was(
    bucket: TestBucket, one: BucketWorkplace
) -> None:
    name = shared(one, b"answers")
    bucket.put(f"jobs/job/answers/{name}", b"others")
    (one.answers / name).unlink()
    fresh = BucketWorkplace(one.folder, one.answers, Bucket(bucket.uri))
    with pytest.raises(LeverError, match="not what was put under its name"):
        fresh.gather()
