"""`lever sweep`: every cell once, in processes, resumed, with the winner's luck in view."""

from __future__ import annotations

import json
import random
from pathlib import Path

import duckdb
import numpy as np
import pytest

from lever_data import connect
from lever_data.catalog import macros
from lever_data.errors import UsageError
from lever_data.relations.rewards import reward_sql
from lever_data.report.statistics import chance_lead
from lever_data.store.store import Store
from lever_demo.demo import DemoOptions, prepare_demo
from lever_demo.world import WorldSpec
from lever_train.flow.sweep import (
    _is_held_out,
    _merit,
    _require_distinct,
    _shared,
    _task,
)
from lever_train.flow.sweep_page import Cell, SweepReport, choice, luck, spreads, sweep_page
from lever_train.options.pipeline import PipelineConfig
from lever_train.options.sweep import SweepConfig, cell_config, load_sweep
from lever_train.options.train import TrainConfig
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
    if "[grid]" in text or "[[cells]]" in text:
        assert len(load_sweep(EXAMPLES / name).settings()) >= 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "s"\n[grid]\n"rce.epoch" = [1]', "did you mean rce.epochs?"),
        ('name = "s"\n[grid]\n"rce.epochs" = [-1]', "rce.epochs"),
        ('name = "s"\n[gird]\n', "did you mean grid?"),
        ("[grid]\n", "name"),
        ("x", "the sweep is not TOML"),
        ('name = "../../escape"', "name"),
        ('name = "/escape"', "name"),
    ],
)
def test_a_bad_sweep_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    done = lever("sweep", _write(tmp_path, text), check=False)
    assert done.returncode == 2 and message in done.stderr


def test_luck_grows_with_the_cells_and_is_none_for_one() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.random((400, 20)) < 0.5).astype(np.float64)
    assert chance_lead(scores[:, :1]) == pytest.approx(0)
    assert 0 < chance_lead(scores[:, :2]) < chance_lead(scores)
    # the expected largest of 20 normal numbers is 1.87 standard deviations above their mean
    assert chance_lead(scores) == pytest.approx(1.87 * np.sqrt(0.25 / 400), rel=0.15)
    assert chance_lead(np.repeat(scores[:, :1], 20, axis=1)) == pytest.approx(
        0
    )  # all the same cell


def _cell(base: PipelineConfig, **changes: dict[str, object]) -> str:
    """The id of a cell whose base has other values in the tables named."""
    tables = {n: getattr(base, n).model_copy(update=new) for n, new in changes.items()}
    changed = base.model_copy(update=tables)
    pipeline = _shared(changed, lambda line: None)
    pipeline.plan()
    return _task(SweepConfig(name="s"), changed, pipeline, {}, {"rce.epochs": 1}).cell


def test_a_cell_is_another_where_anything_it_depends_on_is(tmp_path: Path) -> None:
    base = prepare_demo(DemoOptions(tmp_path, WorldSpec(30, 10, 5)))[1]
    data, run, sft = base.data, base.train.run, base.train.sft
    cells = [_cell(base)]
    cells += [_cell(base, answerer={"spec": "openai:http://h/v1"})]
    cells += [_cell(base, answerer={"model": "m"}), _cell(base, eval={"seed": 1})]
    cells += [_cell(base, data={"image_root": tmp_path}), _cell(base, data={"eval_pool": None})]
    cells += [_cell(base, train={"sft": sft.model_copy(update={"lr": 0.5})})]  # a shared step
    view = data.store / "views" / "mine.sql"
    view.parent.mkdir(parents=True)
    files = [data.query_embeddings, data.eval_embeddings, data.pool, data.eval_pool, view]
    files += [data.eval_questions, data.rl_data[0], base.answerer.query_embeddings]
    for path in files:
        assert path is not None
        with path.open("ab") as file:
            file.write(b" ")
        cells.append(_cell(base))
    assert len(set(cells)) == len(cells) == 15
    quick = run.model_copy(update={"threads": 3, "save_every": 9})
    same = [_cell(base), _cell(base, train={"run": quick}), _cell(base, audit={"fail_on": ()})]
    same += [_cell(base, data={"out": tmp_path / "elsewhere"})]
    assert set(same) == {cells[-1]}


def test_two_cells_that_are_the_same_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_demo(DemoOptions(tmp_path / "d", WorldSpec(60, 20, 8)))
    monkeypatch.chdir(tmp_path)
    text = 'name = "s"\nbase = "d/lever.toml"\n[train.sft]\nepochs = 1\n'
    path = _write(tmp_path, f'{text}[grid]\n"run.save_every" = [10, 20]\n')
    done = lever("sweep", path, check=False)
    assert done.returncode == 2 and "two cells of the sweep are the same" in done.stderr
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize(
    "grid",
    [
        '"reward.mode" = ["soft_only"]\n"reward.hard_weight" = [1.0, 2.0]',
        '"grpo.epochs" = [0]\n"grpo.lr" = [1e-4, 1e-5]',
        '"sft.lr" = [1e-4, 1e-5]',
    ],
)
def test_cells_that_are_equal_by_construction_are_refused(tmp_path: Path, grid: str) -> None:
    base = prepare_demo(DemoOptions(tmp_path / "d", WorldSpec(30, 10, 5)))[1]
    sweep = load_sweep(_write(tmp_path, f'name = "s"\n[grid]\n{grid}\n'))
    with pytest.raises(UsageError, match="two cells of the sweep are the same"):
        _require_distinct(sweep, base)


@pytest.mark.parametrize("name", ["reward_grid", "rce_or_grpo", "views_ablation"])
def test_the_shipped_sweeps_have_no_equal_cells(tmp_path: Path, name: str) -> None:
    """Nor such as only algebra shows: no two rewards rank and space every candidate alike."""
    sweep = load_sweep(EXAMPLES / f"{name}.toml")
    _require_distinct(sweep, prepare_demo(DemoOptions(tmp_path / "d", WorldSpec(30, 10, 5)))[1])
    con = duckdb.connect()
    for text in macros().values():
        con.execute(text)
    draw = random.Random(0)
    scores = [(r := draw.randint(0, 1), r * draw.random(), draw.random()) for _ in range(50)]
    con.execute("create table v (correct int, score double, expected_score double)")
    con.executemany("insert into v values (?, ?, ?)", scores)
    made = []
    for settings in sweep.settings():
        others = {k: v for k, v in settings.items() if not k.startswith("reward.")}
        reward = reward_sql(cell_config(TrainConfig(), sweep, settings, name).reward)
        made.append(json.dumps([others, con.execute(f"select {reward} from v").fetchall()]))
    assert len(set(made)) == len(made)


def _of(accuracy: float, validation: float | None, **settings: object) -> Cell:
    return Cell("c", settings, accuracy, 0.1, 0.9, None, None, None, 60, "e", "p", validation)


def test_cells_are_chosen_on_held_out_questions_where_all_hold_the_same_out() -> None:
    held_out = [_of(0.5, 0.2, **{"rce.lr": 1}), _of(0.4, 0.3, **{"rce.lr": 2})]
    assert _is_held_out(held_out)
    assert max(held_out, key=lambda cell: _merit(cell, True)).validation == 0.3
    assert not _is_held_out([_of(0.5, None), _of(0.4, 0.3)])
    assert not _is_held_out([_of(0.5, 0.2, **{"data.view": ["beam"]})])
    cells = tuple(held_out)
    said = SweepReport("s", cells, 0.01, "r", (), 1, False, {"dataset/split": "d/val"})
    assert "Chosen by the accuracy it is reported with" in choice(said)
    assert "1 distinct cells (1 answered every question like another)" in luck(said)
    page = sweep_page(said)
    assert "partly luck" in page and 'class="marked"' in page


def test_cells_that_differ_in_their_seed_are_summed_up() -> None:
    cells = [_of(accuracy, None, **{"run.seed": i}) for i, accuracy in enumerate((0.2, 0.4))]
    cells += [_of(0.9, None, **{"rce.lr": 1, "run.seed": 0})]
    report = SweepReport("s", tuple(cells), 0, "r", (), 3, False, {"dataset/split": "d/val"})
    assert spreads(report) == [
        "2 seeds of the base: 30.00 % on average, standard deviation 14.14, 20.00 to 40.00."
    ]


@pytest.mark.long
def test_cells_are_judged_on_training_questions_they_did_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_demo(DemoOptions(tmp_path / "d", WorldSpec(120, 40, 8)))
    monkeypatch.chdir(tmp_path)
    text = (
        'name = "s"\nbase = "d/lever.toml"\njudged_on = ["fold_0", "held_out_fold"]\n'
        "[train.rce]\nepochs = 1\n[train.grpo]\nepochs = 0\n[eval]\nshots = [1]\n"
        '[[cells]]\n[[cells]]\n"rce.lr" = 0.01\n'
    )
    done = lever("sweep", _write(tmp_path, text), check=False)
    assert done.returncode == 2 and "the SFT model has learnt from the questions" in done.stderr
    base = tmp_path / "d" / "lever.toml"
    base.write_text(f"{base.read_text()}\n[sft]\nenabled = false\n")
    report = json.loads(lever("sweep", _write(tmp_path, text), "--json", "-").stdout)
    con = connect(Store.open(tmp_path / "d" / "store"))
    asked = "select count(*) from (from fold_0 union all from held_out_fold) where split = 'train'"
    count = con.execute(asked).fetchall()[0][0]
    assert {cell["num_queries"] for cell in report["cells"]} == {count}
    assert {cell["settings"].get("rce.lr") for cell in report["cells"]} == {None, 0.01}
    assert report["about"]["dataset/split"] == "demo/train"
    assert min(abs(cell["difference"]) for cell in report["cells"]) == 0  # the first, to itself
    for cell in report["cells"]:  # the view reads questions, and trainings one run of RL data
        for view in ("fold_0", "held_out_fold"):
            about = tmp_path / "sweeps" / "s" / cell["cell"] / view / "provenance.json"
            queries = json.loads(about.read_text())["queries"]
            held = con.execute(f"select count(*) from {view} where split = 'train'").fetchall()
            assert queries == {"training": 120 - held[0][0], "validation": held[0][0]}
    runs = con.execute("select distinct split from evaluations").fetchall()
    assert runs == [("train",)]


@pytest.mark.long
@pytest.mark.parametrize("jobs", [1, 2])
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
    report = json.loads(lever("sweep", path, "--jobs", jobs, "--json", "-").stdout)
    cells = report["cells"]
    # chosen on held-out training questions: the split that is reported took no part
    assert report["is_held_out"] and report["num_distinct"] <= 2
    assert [c["validation"] for c in cells] == sorted(
        (c["validation"] for c in cells), reverse=True
    )
    page = (tmp_path / "sweeps" / "s" / "sweep.html").read_text()
    assert report["run"] in page and "which took no part in the choice" in page
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
    assert "Chosen by its accuracy on held-out training questions" in again.stdout
    assert "points by luck" in again.stdout
    assert len([r for r in store.runs() if r.kind == "sweep"]) == 1  # the same cells, the same run


@pytest.mark.long
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
    done = lever("sweep", path, "--json", "-", check=False)
    assert done.returncode == 1 and "there is no such view" in done.stderr
    report = json.loads(done.stdout)
    assert len(report["cells"]) == len(report["failed"]) == 1
