"""`lever demo`: the whole pipeline runs, and the win comes from learning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lever_data import connect
from lever_data.errors import UsageError
from lever_data.store.store import Store
from lever_demo.demo import DemoOptions, DemoResult, run_demo
from lever_demo.files import WorldFiles
from lever_demo.world import WorldSpec
from lever_train.evaluate.evaluate import EvalOptions, evaluate
from lever_train.evaluate.heldout import open_held_out
from lever_train.options.evaluate import Questions
from lever_train.options.train import ModelConfig
from lever_train.rollout.answerers.nearest import NearestAnswerer
from lever_train.rollout.policy import SelectorPolicy
from lever_train.selector.kinds import make_selector
from tests.commands import lever
from tests.conftest import DemoDone

SMALL = WorldSpec(train=900, held_out=300)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """Of a world large enough to learn from."""
    return run_demo(DemoOptions(tmp_path_factory.mktemp("demo"), SMALL))


@pytest.mark.long
def test_the_trained_selector_beats_the_baselines(result: DemoResult) -> None:
    accuracy = {(r.selector, r.shots): r.accuracy for r in result.scoreboard.rows}
    for shots in (1, 2, 3, 4):
        order = [accuracy[name, shots] for name in ("random", "nearest", "rce", "oracle")]
        assert order == sorted(order)
    pairs = {(p.a, p.b, p.shots): p for p in result.scoreboard.paired}
    for name in ("rce", "rce+grpo"):
        pair = pairs[name, "nearest", 1]
        assert pair.low > 0 and pair.p < 0.01 and pair.n == 300


@pytest.mark.long
def test_without_training_there_is_no_win(result: DemoResult) -> None:
    """The win is not in the shape of the selector: a fresh one does no better than nearest."""
    files = result.files
    questions = Questions(
        dataset="demo",
        query_embeddings=str(files.embeddings("val")),
        candidate_embeddings=str(files.embeddings("train")),
        pool=files.pool("val"),
    )
    held = open_held_out(connect(result.config.data.store), questions)
    answerer = NearestAnswerer(
        np.load(files.vision("val")), np.load(files.vision("train")), [("x",)]
    )
    torch.manual_seed(0)
    fresh = make_selector(96, ModelConfig()).double().eval()
    options = EvalOptions(shots=(1,), oracle=False)
    outcomes = evaluate(held, answerer.answer, {"fresh": SelectorPolicy("fresh", fresh)}, options)
    found = {o.selector: float(o.accuracy.mean()) for o in outcomes}
    assert found["fresh"] <= found["nearest"] + 0.02


@pytest.mark.long
def test_the_last_line_says_how_to_look_around(demo_done: DemoDone) -> None:
    last = demo_done.stderr.splitlines()[-1]
    assert last == f"look around: lever board --store {demo_done.folder / 'store'}"


@pytest.mark.slow
def test_held_out_questions_are_no_demonstrations(demo_done: DemoDone) -> None:
    files = WorldFiles(demo_done.folder / "world")
    train, held = np.load(files.embeddings("train")), np.load(files.embeddings("val"))
    assert not (held[:, None, :] == train[None, :, :]).all(-1).any()
    learned_from = {
        r.split
        for r in Store.open(demo_done.folder / "store").runs()
        if r.kind in ("rl_data", "beam", "training")
    }
    assert learned_from == {"train"}


@pytest.mark.slow
def test_again_nothing_is_redone(demo_done: DemoDone) -> None:
    steps = [line for line in demo_done.again if line.startswith("[")]
    assert len(steps) == 10
    assert all(
        "skipped: unchanged" in line or "given" in line or "no size" in line for line in steps
    )


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="holds something else"):
        run_demo(DemoOptions(tmp_path, SMALL))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_command(demo_done: DemoDone) -> None:
    folder, done = demo_done.folder, demo_done
    for name in ("zero_shot", "nearest", "sft", "rce+grpo", "oracle", "beam_sample_file_only"):
        assert name in done.stdout
    assert "audit.html" in done.stdout and "curves.html" in done.stdout
    assert f"lever run --config {folder / 'lever.toml'}" in done.stderr
    plan = lever("run", "--config", folder / "lever.toml", "--dry-run").stdout
    assert plan.count("unchanged") == 6
