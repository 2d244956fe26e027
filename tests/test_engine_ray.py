"""`--engine ray` on a cluster of two nodes: the bytes of one process."""

from __future__ import annotations

import hashlib
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
LOST = "lost 1 of 2 machines of the cluster; what was in work there, others did again"

# Two nodes, each with a home and a cache of its own; the second is killed when it has a worker and
# what `kills` names is there. What of it was there then is said, with when it was written.
_CLUSTER = """
import json, sys, threading
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from lever_cli.__main__ import main

WORKERS = "ray::MapWorker", "ray::AnswerWorker"
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
        is_here = any(line.startswith(WORKERS) for line in children(raylet))
        made = {str(path): path.stat().st_mtime_ns for path in Path(folder).glob(kills)}
        if is_here and made:
            nodes.remove_node(second, allow_graceful=False)
            print("killed a node", json.dumps(made), file=sys.stderr)
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


def on_two_nodes(folder: Path, *commands: list[str], kills: str = "") -> str:
    """Run commands with a cluster there; what they said on stderr.

    Args:
        kills: a pattern of files below the folder; one there and a worker on the second node: the
            node is killed.
    """
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
    assert "killed a node" in on_two_nodes(tmp_path, words, kills="first")
    assert files(bucket.uri, "rollout") == files(world.store, "rollout")


@needs_ray
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", ["", "first"])
@pytest.mark.parametrize("command", ["beam", "embed", "eval"])
def test_what_a_model_makes_is_that_of_one_process(
    command: str, kills: str, tmp_path: Path
) -> None:
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
    asked_by_ray = [command, *map(str, words), "--store", str(world.store), *RAY]
    said = on_two_nodes(tmp_path, asked_by_ray, kills=kills)
    assert ("killed a node" in said) == bool(kills)
    if command == "eval":  # others may be ready before Ray has noticed
        assert (LOST in said) == bool(kills)
    kind = {"beam": "beam", "embed": "embeddings", "eval": "evaluation"}[command]
    assert files(world.store, kind) == files(tmp_path / "local", kind)


@needs_ray
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", ["", "sweeps/s/*/result.json"])
def test_cells_of_a_sweep(kills: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is killed when a cell is finished: no finished cell is made again."""
    made = {}
    for place in ("local", "ray"):  # one after the other in one folder: a cell's id holds paths
        prepare_demo(DemoOptions(tmp_path / "here" / "d", WorldSpec(120, 60, 8)))
        monkeypatch.chdir(tmp_path / "here")
        Path("sweep.toml").write_text(_SWEEP)
        if place == "local":
            lever("sweep", "sweep.toml")
        else:
            said = on_two_nodes(tmp_path / "here", ["sweep", "sweep.toml", *RAY], kills=kills)
        report = json.loads(Path("sweeps", "s", "report.json").read_text())
        made[place] = report["cells"], files("d/store", "sweep"), checkpoints(Path("sweeps"))
        if place == "local":
            (tmp_path / "here").rename(tmp_path / "local")
    assert made["ray"] == made["local"] and len(made["local"][0]) == 6
    assert (LOST in said) == bool(kills)
    if kills:
        (killed,) = [line for line in said.splitlines() if line.startswith("killed a node")]
        finished = json.loads(killed.removeprefix("killed a node "))
        assert 0 < len(finished) < 6
        assert finished == {name: Path(name).stat().st_mtime_ns for name in finished}


_SWEEP = """
name = "s"
base = "d/lever.toml"
train.rce.epochs = 4
train.grpo.epochs = 0
train.sft.epochs = 1
[grid]
"reward.mode" = ["hard_plus_soft", "soft_only"]
"run.seed" = [1, 2, 3]
"""


def checkpoints(folder: Path) -> dict[str, str]:
    """The files of weights below a folder, with their checksums."""
    found = sorted(folder.rglob("*.pt"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


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
