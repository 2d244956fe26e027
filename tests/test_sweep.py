"""`lever sweep`: every cell once, in processes, resumed, with the winner's luck in view."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lever_data import connect
from lever_data.demo.world import WorldSpec
from lever_data.store import Store
from lever_train.pipeline.demo import DemoOptions, prepare_demo
from lever_train.sweep.config import cell_config, load_sweep
from lever_train.sweep.sweep import _luck
from tests.commands import lever

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _write(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def test_cells_are_the_listed_ones_crossed_with_the_grid(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        'name = "s"\n[train.rce]\nepochs = 2\n'
        '[[cells]]\n"rce.lr" = 1e-3\n[[cells]]\n"rce.lr" = 1.0\n'
        '[grid]\n"run.seed" = [0, 1]\n"data.view" = [["beam"], ["balanced"]]\n',
    )
    sweep = load_sweep(path)
    settings = sweep.settings()
    assert len(settings) == 8 and len({json.dumps(s) for s in settings}) == 8
    base = prepare_demo(DemoOptions(tmp_path / "d", WorldSpec(30, 10, 5)))[1]
    config = cell_config(base.train, sweep, settings[-1], "x")
    assert (config.rce.epochs, config.rce.lr, config.run.seed) == (2, 1.0, 1)
    assert config.data.view == ("balanced",) and config.run.batch_size == 32  # the base's


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.toml")))
def test_the_examples_are_sweeps_or_configs(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    if "[grid]" in text:
        assert len(load_sweep(EXAMPLES / name).settings()) >= 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "s"\n[grid]\n"rce.epoch" = [1]', "did you mean rce.epochs?"),
        ('name = "s"\n[grid]\n"rce.epochs" = [-1]', "rce.epochs"),
        ('name = "s"\n[gird]\n', "did you mean grid?"),
        ("[grid]\n", "name"),
        ("x", "the sweep is not TOML"),
    ],
)
def test_a_bad_sweep_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    done = lever("sweep", _write(tmp_path, text), check=False)
    assert done.returncode == 2 and message in done.stderr


def test_luck_grows_with_the_cells_and_is_none_for_one() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.random((400, 20)) < 0.5).astype(np.float64)
    assert _luck(scores[:, :1]) == pytest.approx(0)
    assert 0 < _luck(scores[:, :2]) < _luck(scores)
    # the expected largest of 20 normal numbers is 1.87 standard deviations above their mean
    assert _luck(scores) == pytest.approx(1.87 * np.sqrt(0.25 / 400), rel=0.15)
    assert _luck(np.repeat(scores[:, :1], 20, axis=1)) == pytest.approx(0)  # all the same cell


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_sweep_runs_resumes_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    prepare_demo(DemoOptions(tmp_path / "d", WorldSpec(120, 60, 8)))
    monkeypatch.chdir(tmp_path)
    path = _write(
        tmp_path,
        'name = "s"\nbase = "d/lever.toml"\n[train.rce]\nepochs = 1\n[train.grpo]\nepochs = 0\n'
        '[train.sft]\nepochs = 1\n[grid]\n"reward.mode" = ["hard_plus_soft", "soft_only"]\n',
    )
    report = json.loads(lever("sweep", path, "--jobs", jobs, "--json").stdout)
    cells = report["cells"]
    assert [c["accuracy"] for c in cells] == sorted((c["accuracy"] for c in cells), reverse=True)
    assert {c["settings"]["reward.mode"] for c in cells} == {"hard_plus_soft", "soft_only"}
    for cell in cells:
        assert cell["low"] <= cell["accuracy"] <= cell["high"] and cell["num_queries"] == 60
        assert cell["difference_low"] <= cell["difference"] <= cell["difference_high"]
        result = tmp_path / "sweeps" / "s" / cell["cell"] / "result.json"
        assert json.loads(result.read_text())["checkpoint"] == cell["checkpoint"]
    store = Store.open(tmp_path / "d" / "store")
    rows = connect(store).execute("select cell, accuracy from sweeps order by cell").fetchall()
    assert rows == sorted((c["cell"], c["accuracy"]) for c in cells)

    (tmp_path / "sweeps" / "s" / cells[0]["cell"] / "result.json").unlink()
    again = lever("sweep", path, "--jobs", "1")
    assert "1 of 2 cells are finished already" in again.stderr
    assert "best of 2 cells" in again.stdout and "by luck" in again.stdout
    assert len([r for r in store.runs() if r.kind == "sweep"]) == 1  # the same cells, the same run


def test_a_failed_cell_is_named_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_demo(DemoOptions(tmp_path / "d", WorldSpec(120, 40, 8)))
    monkeypatch.chdir(tmp_path)
    path = _write(
        tmp_path,
        'name = "s"\nbase = "d/lever.toml"\n[train.rce]\nepochs = 1\n[train.grpo]\nepochs = 0\n'
        '[train.sft]\nepochs = 1\n[grid]\n"data.view" = [["beam"], ["no_such_view"]]\n',
    )
    done = lever("sweep", path, "--json", check=False)
    assert done.returncode == 1 and "there is no such view" in done.stderr
    report = json.loads(done.stdout)
    assert len(report["cells"]) == len(report["failed"]) == 1
