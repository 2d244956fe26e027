"""kill -9 during generate: the same command again ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from lever_train.rollout.cache import FLUSH_SECONDS
from tests.endpoint import Handler, serving
from tests.rollouts import World, make_world
from tests.torture.conftest import Report
from tests.torture.harness import LONG_SIZES, Nursery, Snapshot, verify, verify_checks

KILLS = 2  # at random moments; a run that was killed goes on until it ends


def undisturbed(warm: Nursery, world: World) -> tuple[Snapshot, float, int]:
    """What a run that nobody kills commits, how long it takes, and the changes it makes."""
    outcome = warm.run(*world.argv())
    assert outcome.code == 0, outcome.stderr
    assert outcome.changes is not None
    snapshot = verify(world.store)
    shutil.rmtree(world.store)
    return snapshot, outcome.seconds, outcome.changes


@pytest.mark.slow
@pytest.mark.parametrize("long", LONG_SIZES)
def test_killed_at_random_moments(
    warm: Nursery, tmp_path: Path, report: Report, long: bool
) -> None:
    world = make_world(tmp_path, queries=160 if long else 24)
    expected, _, _ = undisturbed(warm, world)
    _, seconds, _ = undisturbed(warm, world)  # warm caches: how long one really takes
    roll = random.Random(0)
    kills = finished = 0
    while kills < (200 if long else KILLS):
        outcome = warm.run(
            *world.argv(), kill_after=roll.uniform(0, seconds * (1 if long else 0.7))
        )
        kills += outcome.killed
        _nothing_half_done(world)
        if not outcome.killed:
            finished += 1
            assert outcome.code == 0, outcome.stderr
            assert verify_checks(world.store) == expected
            shutil.rmtree(world.store)
    assert warm.run(*world.argv()).code == 0
    assert verify(world.store) == expected
    assert not list((world.store / "jobs").iterdir())
    report(f"{kills} kills, {finished + 1} runs that ended after them")


@pytest.mark.slow
@pytest.mark.parametrize("long", LONG_SIZES)
def test_killed_before_every_change_of_the_file_system(
    warm: Nursery, tmp_path: Path, report: Report, long: bool
) -> None:
    """Every state that a crash between two steps can leave behind."""
    world = make_world(tmp_path, queries=20)
    expected, _, changes = undisturbed(warm, world)
    moments = range(1, changes + 1, 1 if long else max(1, changes // 3))
    for moment in moments:
        shutil.rmtree(world.store, ignore_errors=True)
        assert warm.run(*world.argv(), kill_before=moment).killed
        outcome = warm.run(*world.argv())
        assert outcome.code == 0, outcome.stderr
        assert verify(world.store) == expected
        assert not list((world.store / "jobs").iterdir())
    report(f"{len(moments)} of {changes} steps")


@pytest.mark.long
def test_nothing_is_paid_twice_after_a_kill(warm: Nursery, tmp_path: Path) -> None:
    """Answers of finished shards are in the store: a resumed run asks for the others alone."""
    world = make_world(tmp_path, queries=80)
    whole = warm.run(*world.argv("--json", "-"))
    asked = json.loads(whole.stdout)["asked"]
    shutil.rmtree(world.store)
    assert whole.changes is not None
    assert warm.run(*world.argv(), kill_before=whole.changes * 5 // 12).killed
    done = len(_done(world))
    assert 0 < done < 10
    outcome = json.loads(warm.run(*world.argv("--json", "-")).stdout)
    assert outcome["asked"] < asked * (10 - done + 1) / 10


@pytest.mark.long
@pytest.mark.full
def test_what_an_endpoint_said_is_on_disk_within_15_seconds(tmp_path: Path, report: Report) -> None:
    """kill -9 at random: lost is what arrived in the last 15 s, and what was on its way."""
    world, roll = make_world(tmp_path, queries=160), random.Random(0)
    lost = held = 0
    with serving() as endpoint:
        endpoint.delay, said = 0.5, list[float]()

        def fault(handler: Handler, question: str, attempt: int) -> bool:
            said.append(time.monotonic())
            return False

        endpoint.fault = fault
        words = ["--answerer", f"openai:{endpoint.url}", "--model", "m", "--without-images"]
        argv = [sys.executable, "-m", "lever_cli", *world.argv(*words, "--concurrency", "4")]
        for _ in range(4):
            said.clear()
            with subprocess.Popen(argv) as job:
                time.sleep(roll.uniform(20, 45))
                assert job.poll() is None
                job.kill()
                killed = time.monotonic()
            before, held = held, _on_disk(world)
            # a second more: the client looks at its clock that often
            young = sum(killed - t <= FLUSH_SECONDS + 1 for t in said)
            assert len(said) - (held - before) <= young + endpoint.active
            lost += len(said) - (held - before)
    report(f"4 kills, {held} answers kept, {lost} asked again")


def _on_disk(world: World) -> int:
    segments = world.store.glob("cache/*/seg-*.arrow")
    return sum(pa.ipc.open_file(path).get_batch(0).num_rows for path in segments)


def _done(world: World) -> list[Path]:
    return list(world.store.glob("jobs/rollout-*/shard-*/report.json"))


def _nothing_half_done(world: World) -> None:
    """A shard's folder is there whole or not at all; nothing but whole runs is committed."""
    for folder in world.store.glob("jobs/rollout-*/shard-*[0-9]"):
        held = {p.name for p in folder.iterdir()}
        assert held == {"candidates.parquet", "queries.parquet", "report.json"}
    if (world.store / "runs").is_dir():
        verify(world.store)
