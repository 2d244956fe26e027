"""`lever demo`: the whole line runs, and the win comes from learning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lever_data.demo_files import WorldFiles
from lever_data.demo_world import WorldSpec
from lever_data.errors import UsageError
from lever_data.store import Store
from lever_train.demo import DemoOptions, DemoResult, held_out, run_demo, world_answerer
from lever_train.evaluate import EvalOptions, evaluate
from lever_train.history import make_selector
from lever_train.rollout.policy import Trained
from lever_train.selector import SelectorConfig

SMALL = WorldSpec(train=900, held_out=300, pool=24)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(DemoOptions(tmp_path_factory.mktemp("demo"), SMALL))


def test_the_trained_selector_beats_the_baselines(result: DemoResult) -> None:
    accuracy = {(r.selector, r.shots): r.accuracy for r in result.scoreboard.rows}
    for shots in (1, 2):
        order = [accuracy[name, shots] for name in ("random", "nearest", "trained", "oracle")]
        assert order == sorted(order)
    against = {(p.b, p.shots): p for p in result.scoreboard.paired if p.a == "trained"}
    for shots in (1, 2):
        pair = against["nearest", shots]
        assert pair.low > 0 and pair.p < 0.01 and pair.n == 300


def test_without_training_there_is_no_win(result: DemoResult) -> None:
    """The win is not in the shape of the selector: a fresh one does no better than nearest."""
    files, store = result.files, Store.open(result.store)
    held = held_out(files, store)
    torch.manual_seed(0)
    fresh = make_selector(SelectorConfig(dim=96)).double().eval()
    outcomes = evaluate(
        held,
        world_answerer(files, held).answer,
        {"fresh": Trained("fresh", fresh)},
        EvalOptions(shots=(1,), oracle=False),
    )
    found = {o.selector: float(o.accuracy.mean()) for o in outcomes}
    assert found["fresh"] <= found["nearest"] + 0.02


def test_held_out_questions_are_no_demonstrations(result: DemoResult) -> None:
    train = np.load(result.files.embeddings("train"))
    held = np.load(result.files.embeddings("val"))
    assert not (held[:, None, :] == train[None, :, :]).all(-1).any()
    assert {run.split for run in Store.open(result.store).runs()} == {"train"}


def test_again_into_the_same_folder_gives_the_same(result: DemoResult) -> None:
    folder = result.store.parent
    again = run_demo(DemoOptions(folder, SMALL))
    assert again.scoreboard == result.scoreboard
    assert not any(done.is_new for done in again.ingested)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="holds something else"):
        run_demo(DemoOptions(tmp_path, SMALL))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lever_cli", "demo", "--out", "d", "--questions", "120"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("zero_shot", "random", "nearest", "trained", "oracle", "beam_sample_file_only"):
        assert name in done.stdout
    assert WorldFiles(tmp_path / "d" / "world").rl_data.exists()
    assert "look around: lever views --store d/store" in done.stderr
