"""`--engine ray`: the rows of `--engine local`, from two workers on a local Ray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lever_data.errors import UsageError
from lever_data.store.store import Run, Store
from lever_train.options.rollout import Execution
from lever_train.rollout.generate import generate
from tests.rollouts import World, make_world

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is an extra: pip install 'lever[ray]'")


def by_ray(world: World, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: Ray's threads and warnings stay there."""
    words = [sys.executable, "-m", "lever_cli", *world.argv("--engine", "ray", "--workers", "2")]
    quiet = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*words, *more], capture_output=True, text=True, timeout=240, env=quiet)


@needs_ray
def test_ray_makes_the_same_bytes(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    done = by_ray(world, "--shots", "1,2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("generated rollout-d-train-")  # and nothing of Ray's
    from_ray = only_run(world)
    Store.open(world.store).remove(from_ray.run)
    local = generate(world.request(shots=(1, 2))).run
    assert local is not None
    assert local.files == from_ray.files
    assert not list((world.store / "jobs").iterdir())


def only_run(world: World) -> Run:
    (run,) = Store.open(world.store).runs()
    return run


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed here")
def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--engine ray needs Ray"):
        generate(make_world(tmp_path).request(), Execution(engine="ray"))


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UsageError, match=r"should be 'local' or 'ray'; at Execution\.engine"):
        Execution(engine="spark")
