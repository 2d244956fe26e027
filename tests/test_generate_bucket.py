"""`lever generate` on machines that share nothing but a bucket: the bytes of one process."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lever_data.store.store import Run, Store
from lever_data.store.workplace import LEASE
from lever_train.options.rollout import Execution
from lever_train.rollout.generate import generate
from lever_train.rollout.job import Job, new_asker, shard_folder
from lever_train.rollout.resolve import resolve
from lever_train.rollout.shards import Report, ShardRows
from lever_train.rollout.work import make_shard
from tests.cloud import Cloud, Reply, Request, TestBucket, environment, new_bucket
from tests.rollouts import World, make_world

LOST = LEASE + timedelta(seconds=1)
Start = Callable[..., Any]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def whole(world: World) -> Run:
    """What one process makes in a folder."""
    run = generate(world.request(shots=(1, 2))).run
    assert run is not None
    return run


def at(machine: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on at a machine, which has a cache of its own."""
    monkeypatch.setenv("LEVER_CACHE", str(world.folder / machine))


def only_run(bucket: TestBucket) -> Run:
    """The run of the bucket, of whose job nothing is left."""
    assert [key for key in bucket.listed() if not key.startswith("runs/")] == ["lever.json"]
    (run,) = Store.open(bucket.uri).runs()
    return run


@pytest.mark.long
def test_parts_on_two_machines_make_the_bytes_of_one(
    bucket: TestBucket, world: World, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tallies = []
    for part in ("0/2", "1/2"):
        at(part[0], world, monkeypatch)
        outcome = generate(world.request(store=bucket.uri, shots=(1, 2)), Execution(shard=part))
        tallies.append(outcome.tally.asked)
    assert outcome.run is not None
    assert only_run(bucket).files == outcome.run.files == whole.files
    assert min(tallies) > 0
    at("third", world, monkeypatch)
    again = generate(world.request(store=bucket.uri, shots=(1, 2)))
    assert again.already and again.tally.asked == 0


@pytest.mark.long
def test_answers_of_a_lost_machine_are_not_paid_again(
    bucket: TestBucket, world: World, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the rows of one shard and the answers of another when it was lost."""
    at("lost", world, monkeypatch)
    job = resolve(world.request(store=bucket.uri, shots=(1, 2)))
    folder, asker = shard_folder(job), new_asker(job)
    list(folder.make_all([0], lambda i: make_shard(job, job.shards[i]), asker))
    claim = folder.place.claimed("shard-00001", wait=False)
    assert claim.__enter__()
    list(asker.serve([make_shard(job, job.shards[1])]))
    bucket.age(f"jobs/{folder.place.folder.name}/shard-00001.lease", LOST)
    at("other", world, monkeypatch)
    outcome = generate(world.request(store=bucket.uri, shots=(1, 2)))
    claim.__exit__(None, None, None)
    assert only_run(bucket).files == whole.files
    Store.open(bucket.uri).remove(whole.run)
    at("fresh", world, monkeypatch)
    again = generate(world.request(store=bucket.uri, shots=(1, 2)))
    assert again.tally.asked == asker.tally.asked + outcome.tally.asked


def _marked(job: Job, part: slice, count: int) -> Any:
    """A shard whose report says who made it."""
    made: ShardRows = yield from make_shard(job, part)
    return replace(made, report=Report(count))


@pytest.mark.long
def test_a_slow_worker_that_was_taken_for_dead_does_no_harm(
    bucket: TestBucket, world: World, whole: Run
) -> None:
    request = world.request(store=bucket.uri, shots=(1, 2))
    job = resolve(request)
    slow, other = shard_folder(job), shard_folder(job)
    lease = f"jobs/{slow.place.folder.name}/shard-00000.lease"

    def overtaken(index: int) -> Any:
        bucket.age(lease, LOST)
        list(other.make_all([0], lambda i: _marked(job, job.shards[i], 2), new_asker(job)))
        return (yield from _marked(job, job.shards[index], 1))

    assert list(slow.make_all([0], overtaken, new_asker(job))) == [0]
    assert slow.report() == Report(2)
    assert generate(request).run is not None
    assert only_run(bucket).files == whole.files


def begin(
    world: World, uri: str, machine: str, *prefix: str, **environment: str
) -> subprocess.Popen[str]:
    """The command on a machine: a home, a cache and a working folder of its own."""
    home = world.folder / machine
    home.mkdir()
    words = world.argv("--shots", "1,2", "--shard-size", "4", "--json", "-", store=uri)
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "lever_cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env=os.environ | {"HOME": str(home), "LEVER_CACHE": str(home / "cache")} | environment,
    )


def end(process: subprocess.Popen[str]) -> Any:
    """What it says it did, or by which signal it was killed."""
    said, _ = process.communicate()
    return process.returncode or json.loads(said)


@pytest.mark.long
def test_two_machines_at_once_pay_once(bucket: TestBucket, world: World) -> None:
    alone = generate(world.request(shots=(1, 2)))
    both, first = threading.Barrier(2), itertools.count()

    def meet(request: Request, start: Start) -> Reply | None:
        is_claim = request.method == "PUT" and request.path.endswith("/shard-00001.lease")
        if is_claim and next(first) < 2:
            both.wait(60)
        return None

    bucket.cloud.spoil = meet
    machines = [begin(world, bucket.uri, name) for name in ("one", "two")]
    told = [end(machine) for machine in machines]
    assert alone.run is not None and only_run(bucket).files == alone.run.files
    assert sum(said["asked"] for said in told) == alone.tally.asked
    assert min(said["asked"] for said in told) > 0
    assert alone.run.run in {said["run"] for said in told}


@pytest.mark.long
def test_one_is_killed_and_the_other_takes_over(
    bucket: TestBucket, world: World, whole: Run
) -> None:
    """Whoever puts the fourth shard is killed before it is there. The other finds its shards held,
    and makes them once the leases have run out."""
    killed: list[bytes] = []
    puts = itertools.count(1)

    def watch(request: Request, start: Start) -> Reply | None:
        """Kill; and let the lease run out when the other finds it held."""
        key = request.path.removeprefix("a/store/")
        if request.method == "PUT" and key.endswith(".zip") and next(puts) == 4:
            owner = bucket.read(key.replace(".zip", ".lease")).split()[1]
            os.kill(int(owner), signal.SIGKILL)
            killed.append(owner)
            raise ConnectionAbortedError
        is_claim = killed and request.method == "PUT" and key.endswith(".lease")
        if is_claim and key in bucket.listed() and killed[0] in bucket.read(key).split():
            bucket.age(key, LOST)
        return None

    bucket.cloud.spoil = watch
    machines = [begin(world, bucket.uri, name) for name in ("one", "two")]
    ends = [end(machine) for machine in machines]
    bucket.cloud.calm()
    assert -signal.SIGKILL in ends and whole.run in [said["run"] for said in ends if said != -9]
    assert only_run(bucket).files == whole.files


@pytest.fixture
def networks() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces that reach this one by a cable each, and nothing else: their names,
    and this end's address."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces need iproute2 and root")
    made = [(f"lever-{os.getpid()}-{n}", f"lv{os.getpid()}{n}", f"10.201.{n}") for n in (1, 2)]

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)

    try:
        for name, cable, net in made:
            ip(f"netns add {name}")
            ip(f"link add {cable} type veth peer name eth0 netns {name}")
            ip(f"addr add {net}.1/24 dev {cable}")
            ip(f"link set {cable} up")
            ip(f"-n {name} addr add {net}.2/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
        yield [(name, f"{net}.1") for name, _, net in made]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    finally:
        for name, _, _ in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_networks_with_only_the_bucket_between_them(
    networks: list[tuple[str, str]], world: World, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cloud("0.0.0.0") as cloud:
        for name, value in environment(cloud).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LEVER_CACHE", str(world.folder / "here"))
        bucket = new_bucket(cloud)
        machines = [
            begin(
                world,
                bucket.uri,
                network,
                *("ip", "netns", "exec", network),
                AWS_ENDPOINT_URL=f"http://{host}:{cloud.port}",
            )
            for network, host in networks
        ]
        told = [end(machine) for machine in machines]
        assert whole.run in [said["run"] for said in told]
        assert only_run(bucket).files == whole.files
