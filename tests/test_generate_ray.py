"""`--engine ray`: the rows of `--engine local`, from two workers on a local Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lever_data.errors import UsageError
from lever_data.store.store import Run, Store
from lever_train.options.rollout import Execution
from lever_train.rollout.generate import generate
from lever_train.rollout.resolve import resolve
from tests.rays import HAS_RAY, needs_ray, ray_environment
from tests.rollouts import World, make_world


def by_ray(world: World, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: Ray's threads and warnings stay there."""
    words = [sys.executable, "-m", "lever_cli", *world.argv("--engine", "ray", "--workers", "2")]
    quiet = ray_environment()
    return subprocess.run([*words, *more], capture_output=True, text=True, timeout=240, env=quiet)


@needs_ray
def test_ray_makes_the_same_bytes(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    done = by_ray(world, "--shots", "1,2", "--json", "-")
    assert done.returncode == 0, done.stderr
    from_ray = only_run(world)
    assert json.loads(done.stdout)["run"] == from_ray.run  # and nothing of Ray's
    Store.open(world.store).remove(from_ray.run)
    local = generate(world.request(shots=(1, 2))).run
    assert local is not None
    assert local.files == from_ray.files
    assert not list((world.store / "jobs").iterdir())


RESERVED = """
import sys, ray, torch
from pathlib import Path
from lever_data.errors import UsageError
from lever_train.options.rollout import Execution
from lever_train.rollout.generate import generate
from tests.rollouts import World

ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, logging_level="error")
world, free = World(Path(sys.argv[1]), 40), []
try:
    generate(world.request(), Execution(engine="ray", workers=3, gpus_per_worker=1))
except UsageError as error:
    print(error)
watch = lambda done, total, note: free.append(ray.available_resources().get("GPU", 0))
generate(world.request(), Execution(engine="ray", workers=2, gpus_per_worker=1), watch)
print("free:", min(free))
"""


@needs_ray
def test_workers_reserve_their_gpus(tmp_path: Path) -> None:
    """On a cluster that declares GPUs it does not have: what counts is what Ray was asked for."""
    make_world(tmp_path)
    words = [sys.executable, "-c", RESERVED, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=ray_environment())
    assert done.returncode == 0, done.stderr
    refusal, free = done.stdout.splitlines()
    assert "too few GPUs for so many workers; value '3 x 1, and Ray sees 2'" in refusal
    assert float(free.removeprefix("free: ")) == 0


LOST = """
import os, signal, sys, threading
from pathlib import Path
from lever_cli.__main__ import main

def parent(process):
    return int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])

def is_worker(process):
    try:
        named = process.joinpath("cmdline").read_text().startswith("ray::MapWorker")
        raylet = Path("/proc", str(parent(process)))
        return named and parent(raylet) == os.getpid()
    except OSError:
        return False

def kill_one():
    while not over.wait(0.02):
        found = [p for p in Path("/proc").glob("[0-9]*") if is_worker(p)]
        if found:
            os.kill(int(found[0].name), signal.SIGKILL)
            print("killed one", file=sys.stderr)
            return

over = threading.Event()
killer = threading.Thread(target=kill_one)
killer.start()
try:
    code = main(sys.argv[1:])
finally:
    over.set()
    killer.join()
sys.exit(code)
"""


@needs_ray
def test_json_stays_json_when_a_worker_is_lost(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    words = world.argv("--engine", "ray", "--workers", "2", "--json", "-")
    quiet = ray_environment()
    done = subprocess.run(
        [sys.executable, "-c", LOST, *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=quiet,
    )
    assert "killed one" in done.stderr
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == only_run(world).run


def test_only_who_computes_needs_the_device(tmp_path: Path) -> None:
    request = make_world(tmp_path).request(device="cuda:77")
    assert resolve(request, computes=False).request.inputs.device == "cuda:77"
    with pytest.raises(UsageError, match="CUDA device"):
        resolve(request)


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
