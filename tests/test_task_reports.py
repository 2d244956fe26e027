"""Rewards, audit, diff, sweep and pages of another task than vqa say what its metric says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lever_board.board import Board
from lever_board.export import export
from lever_data import connect
from lever_data.items.task import Task
from lever_data.items.text_metrics import squad_exact, squad_f1
from lever_data.relations.reward_spec import RewardSpec
from lever_data.report.audit import audit
from lever_data.report.audit_page import audit_page
from lever_data.report.diff import diff
from lever_data.report.options import AuditRequest, DiffRequest, RescoreRequest
from lever_data.report.rescore import rescore
from lever_data.store.store import Run, Store
from tests.commands import lever

pytestmark = pytest.mark.slow
ANSWERS = ("red barn", "blue barn", "two dogs", "two cats", "a red kite", "dogs")
CONFIG = """
[data]
store = "store"
out = "out"
dataset = "animals"
items = "train.jsonl"
eval_items = "val.jsonl"
query_embeddings = "train.npy"
eval_embeddings = "val.npy"
[pool]
size = 6
[sft]
enabled = false
[generate]
shot_num = 1
num_beams = 4
temps = []
num_random = 2
[answerer]
log_probs = true
[train.run]
batch_size = 16
[eval]
shots = [1]
"""
SWEEP = """
name = "rewards"
base = "lever.toml"
[train.rce]
epochs = 1
[grid]
"reward.mode" = ["soft_only", "hard_only"]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A swept store of questions whose answers share words: F1 is often neither 0 nor 1."""
    folder, rng = tmp_path_factory.mktemp("qa"), np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 12)):
        kinds = rng.integers(0, len(ANSWERS), count)
        rows = [{"question": f"what is {n}?", "answers": [ANSWERS[k]]} for n, k in enumerate(kinds)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        near = np.eye(len(ANSWERS))[kinds] + rng.normal(0, 0.6, (count, len(ANSWERS)))
        np.save(folder / f"{split}.npy", near.astype(np.float32))
    (folder / "lever.toml").write_text(CONFIG)
    (folder / "sweep.toml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lever("sweep", "sweep.toml")
    return Store.open(folder / "store")


def runs(store: Store, kind: str) -> list[Run]:
    return [run for run in store.runs() if run.kind == kind]


def scores(store: Store, run: Run) -> list[tuple[Any, ...]]:
    """(answer, references, correct, score) of every candidate of a run."""
    with connect(store, runs=[run.run, *(r.run for r in runs(store, "examples"))]) as con:
        return con.execute(
            "select answer, gt_answers, correct, score from stg_candidates "
            "inner join queries using (dataset, split, query_id) order by query_id, candidate"
        ).fetchall()


@pytest.mark.long
def test_rewards_are_of_the_tasks_metric(store: Store) -> None:
    (rollout,) = runs(store, "rollout")
    found = scores(store, rollout)
    said, known = [row[0] for row in found], [row[1] for row in found]
    assert [row[3] for row in found] == squad_f1(said, known)
    assert [row[2] for row in found] == squad_exact(said, known)
    assert len({row[3] for row in found}) > 2  # some share words and are not right
    means = {
        "hard_only": np.mean(squad_exact(said, known)),
        "soft_only": np.mean(squad_f1(said, known)),
        "hard_plus_soft": np.mean(squad_exact(said, known)) + np.mean(squad_f1(said, known)),
    }
    for mode, mean in means.items():
        request = AuditRequest(reward=RewardSpec(mode=mode), runs=(rollout.run,))
        assert audit(store, request).figures["mean_reward"] == pytest.approx(mean)
    gt_prob = AuditRequest(reward=RewardSpec(mode="hard01_plus_gtprob"), runs=(rollout.run,))
    assert audit(store, gt_prob).figures["missing_share"] == 0


@pytest.mark.long
def test_an_audit_says_nothing_of_vqa(store: Store) -> None:
    found = audit(store, AuditRequest())
    assert found.figures["scorers"] == ["nearest~squad-f1-1"]
    assert named_vqa(audit_page([found])) == []


@pytest.mark.long
def test_two_metrics_of_the_same_answers_are_compared(store: Store) -> None:
    (rollout,) = runs(store, "rollout")
    strict = rescore(store, RescoreRequest(run=rollout.run, task=Task(name="qa", metric="label")))
    found = diff(store, DiffRequest(a=rollout.run, b=strict.run.run))
    old, new = ([row[3] for row in scores(store, run)] for run in (rollout, strict.run))
    assert found.mean_change == pytest.approx(np.mean(new) - np.mean(old))
    assert found.changed == sum(a != b for a, b in zip(old, new, strict=True)) > 0
    store.remove(strict.run.run)


@pytest.mark.long
def test_a_sweep_ranks_by_the_tasks_metric(store: Store) -> None:
    (made,) = runs(store, "sweep")
    with connect(store) as con:
        rows = con.execute("select evaluation, accuracy from sweeps").fetchall()
        for evaluation, accuracy in rows:
            sql = "select avg(accuracy), min(metric), max(metric) from evaluations"
            mean = con.execute(f"{sql} where run = ? and selector = 'cell'", [evaluation])
            assert mean.fetchall() == [(pytest.approx(accuracy), "squad-f1-1", "squad-f1-1")]
    assert len(rows) == 2 and made.rows == {"sweeps": 2}
    page = store.path.parent / "sweeps" / "rewards" / "sweep.html"
    assert named_vqa(page.read_text()) == []


@pytest.mark.long
def test_no_page_of_the_board_speaks_of_vqa(store: Store, tmp_path: Path) -> None:
    export(Board(store), tmp_path / "pages", queries=4)
    pages = sorted((tmp_path / "pages").rglob("*.html"))
    assert len(pages) > 10
    assert {page.name: found for page in pages if (found := named_vqa(page.read_text()))} == {}
    shown = "".join(page.read_text() for page in pages)
    assert "squad-f1" in shown


def named_vqa(page: str) -> list[str]:
    """Where the text of a page speaks of VQA; names of columns and SQL may."""
    text = re.sub(r"(?s)<(script|style|pre|code|details|textarea).*?</\1>", "", page)
    text = re.sub(r"<[^>]*>", " ", text)
    return re.findall(r".{0,30}\bVQA\b.{0,30}|.{0,30}\bannotator.{0,30}", text)
