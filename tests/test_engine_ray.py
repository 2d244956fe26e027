"""`--engine ray` on a cluster of two nodes: the bytes of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lever_data.store.store import Store
from lever_demo.demo import DemoOptions, prepare_demo
from lever_demo.world import WorldSpec
from lever_train.rollout.answerers.base import Answer
from lever_train.rollout.ray_answers import ActorFlight
from tests.cloud import TestBucket
from tests.commands import lever
from tests.encoders import tiny_clip
from tests.rays import needs_ray, ray_environment
from tests.rollouts import make_world
from tests.tiny_lm import save_tiny_lm

RAY = ("--engine", "ray", "--workers", "2")

# Two nodes, each with a home and a cache of its own; the second is killed when it has a worker.
_CLUSTER = """
import json, sys, threading
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from lever_cli.__main__ import main

folder, kills, *commands = json.loads(sys.argv[1])
nodes = Cluster()

def node(name):
    home = Path(folder, name)
    home.mkdir()
    env = {"HOME": str(home), "LEVER_CACHE": str(home / "cache")}
    return nodes.add_node(num_cpus=2, include_dashboard=False, env_vars=env)

def children(process):
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process:
                yield stat.with_name("cmdline").read_text()
        except OSError:
            pass

def kill_the_second():
    raylet = second.all_processes["raylet"][0].process.pid
    while not over.wait(0.05):
        if any(line.startswith("ray::MapWorker") for line in children(raylet)):
            nodes.remove_node(second, allow_graceful=False)
            print("killed a node", file=sys.stderr)
            return

first, second, over = node("first"), node("second"), threading.Event()
ray.init(address=nodes.address, logging_level="error")
if kills:
    threading.Thread(target=kill_the_second, daemon=True).start()
codes = []
for words in commands:
    try:
        codes.append(main(words))
    except SystemExit as stop:
        codes.append(stop.code)
over.set()
ray.shutdown()
nodes.shutdown()
sys.exit(any(codes))
"""


def on_two_nodes(folder: Path, *commands: list[str], kills: bool = False) -> str:
    """Run commands with a cluster there; what they said on stderr."""
    given = json.dumps([str(folder), kills, *commands])
    done = subprocess.run(
        [sys.executable, "-c", _CLUSTER, given],
        capture_output=True,
        text=True,
        timeout=1700,
        env=ray_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def files(store: str | Path, kind: str) -> dict[str, str]:
    """The files of a store's one run of a kind, with their checksums."""
    (run,) = [run for run in Store.open(store).runs() if run.kind == kind]
    return {run.run: "", **run.files}


@needs_ray
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_node_is_killed_and_the_bucket_has_the_same_bytes(
    bucket: TestBucket, tmp_path: Path
) -> None:
    world = make_world(tmp_path)
    lever(*world.argv("--shots", "1,2"))
    words = world.argv("--shots", "1,2", *RAY, store=bucket.uri)
    assert "killed a node" in on_two_nodes(tmp_path, words, kills=True)
    assert files(bucket.uri, "rollout") == files(world.store, "rollout")


@needs_ray
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", ["beam", "embed", "eval"])
def test_what_a_model_makes_is_that_of_one_process(command: str, tmp_path: Path) -> None:
    """Of a small model that each worker loads; 600 questions are two parts of vectors."""
    world = make_world(tmp_path, 600)
    place: list[Any] = ["--dataset", "d", "--split", "train"]
    asked = [*place, "--query-embeddings", world.embeddings, "--pool", world.pool, "--limit", "12"]
    if command == "embed":
        words = [*place, "--encoder", tiny_clip(tmp_path / "clip"), "--features", "text"]
    else:
        model = save_tiny_lm(tmp_path / "Tiny-LM")
        words = [*asked, "--answerer", f"transformers:{model}", "--without-images"]
        if command == "beam":
            words += ["--beam-size", "2", "--shot-num", "1", "--shard-size", "4"]
        else:
            words += ["--candidate-embeddings", world.embeddings, "--max-new-tokens", "2"]
    for store in (tmp_path / "local", world.store):
        lever("ingest", world.questions, world.annotations, *place, "--store", store)
    lever(command, *words, "--store", tmp_path / "local")
    on_two_nodes(tmp_path, [command, *map(str, words), "--store", str(world.store), *RAY])
    kind = {"beam": "beam", "embed": "embeddings", "eval": "evaluation"}[command]
    assert files(world.store, kind) == files(tmp_path / "local", kind)


@needs_ray
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_cells_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_demo(DemoOptions(tmp_path / "d", WorldSpec(120, 60, 8)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text(
        'name = "s"\nbase = "d/lever.toml"\n[train.rce]\nepochs = 1\n[train.grpo]\nepochs = 0\n'
        '[train.sft]\nepochs = 1\n[grid]\n"reward.mode" = ["hard_plus_soft", "soft_only"]\n'
    )
    on_two_nodes(tmp_path, ["sweep", "sweep.toml", *RAY])
    by_ray = json.loads((tmp_path / "sweeps" / "s" / "report.json").read_text())
    for result in (tmp_path / "sweeps" / "s").glob("*/result.json"):
        result.unlink()
    lever("sweep", "sweep.toml")
    local = json.loads((tmp_path / "sweeps" / "s" / "report.json").read_text())
    assert by_ray["cells"] == local["cells"] and len(local["cells"]) == 2


@pytest.mark.parametrize("spec", ["nearest", "openai:http://127.0.0.1:9/v1"])
def test_what_no_worker_loads_is_asked_from_here(tmp_path: Path, spec: str) -> None:
    world = make_world(tmp_path, 12)
    place = ("--store", world.store, "--dataset", "d", "--split", "train")
    lever("ingest", world.questions, world.annotations, *place)
    vectors = ("--query-embeddings", world.embeddings, "--candidate-embeddings", world.embeddings)
    named = ("--answerer", spec, "--model", "m", "--without-images", "--pool", world.pool)
    done = lever("eval", *place, *vectors, *named, *RAY, check=False)
    assert done.returncode == 2
    assert "--engine ray is for a model that each worker loads" in done.stderr


class _Ray:
    """Answers when it is waited for, the first that was asked first; ``late``: not this time."""

    def __init__(self) -> None:
        self.late = False

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], Any]:
        return ([] if self.late else refs[:num_returns]), None

    def get(self, ref: Any) -> Any:
        return ref()


class _Actor:
    def __init__(self, batches: list[int]) -> None:
        self.batches = batches
        self.answer = self

    def remote(self, prompts: list[str]) -> Any:
        self.batches.append(len(prompts))
        return lambda: [Answer(prompt) for prompt in prompts]


def test_prompts_travel_in_full_batches_and_come_back_with_their_tickets() -> None:
    ray, batches = _Ray(), list[int]()
    flight = ActorFlight(ray, [_Actor(batches), _Actor(batches)], 4)
    assert flight.room == 12
    for n in range(11):
        flight.send(b"%d" % n, str(n))  # type: ignore[arg-type]
    assert batches == [4, 4] and flight.room == 1
    ray.late = True
    assert flight.receive(0) == [] and batches == [4, 4]
    ray.late, found = False, []
    while flight.room < 12:
        found += flight.receive(1)
    assert sorted((int(t), a.text) for t, a in found) == [(n, str(n)) for n in range(11)]
    assert batches == [4, 4, 3]
