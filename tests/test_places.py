"""A key is never without its place: two datasets, two splits, two scorers, and all ids equal.

Every figure of a command over a store with all of them is that of a store with the one place alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq
import pytest

from lever_data.store.store import Run, Store
from tests.cases import long
from tests.commands import lever

DATASETS, SPLITS, SCORERS = ("a", "b"), ("train", "val"), ("m1", "m2")
QUERIES, WIDTH, POOL = 24, 8, 6
PLACE = ("--dataset", "a", "--split", "train")
ANSWERS = ("red", "blue", "dog", "cup")
VIEW = "select * from all_candidates where dataset = 'a' and split = 'train'"


@dataclass(frozen=True)
class Place:
    """Files of one dataset and split; ids begin at 0 in every one of them, meanings differ."""

    folder: Path
    dataset: str
    split: str

    @property
    def seed(self) -> int:
        return 2 * DATASETS.index(self.dataset) + SPLITS.index(self.split)

    def file(self, name: str) -> Path:
        return self.folder / f"{self.dataset}_{self.split}_{name}"

    def write(self) -> None:
        rng = np.random.default_rng(self.seed)
        topic = rng.integers(0, len(ANSWERS), QUERIES)
        vectors = np.eye(len(ANSWERS), WIDTH)[topic] + 0.4 * rng.standard_normal((QUERIES, WIDTH))
        np.save(self.file("vectors.npy"), vectors.astype(np.float32))
        asked, noted = [], []
        for q in range(QUERIES):
            number = 1000 * (self.seed + 1) + q
            said = [ANSWERS[topic[q]]] * 6 + [ANSWERS[(topic[q] + 1) % 4]] * 4
            asked.append({"question_id": number, "image_id": q, "question": f"{self.seed}: {q}?"})
            noted.append({"question_id": number, "answers": [{"answer": a} for a in said]})
        self.file("q.json").write_text(json.dumps({"questions": asked}))
        self.file("a.json").write_text(json.dumps({"annotations": noted}))
        for scorer in SCORERS:
            rng = np.random.default_rng([self.seed, SCORERS.index(scorer)])
            data = _rl_data(rng, scorer, topic)
            self.file(f"{scorer}.json").write_text(json.dumps(data))


def _rl_data(rng: np.random.Generator, scorer: str, topic: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Candidates of every query out of a pool of its own; what is right depends on the scorer."""
    data: dict[str, Any] = {"_meta": {"vqa_model": scorer}}
    for q in range(QUERIES):
        pool = sorted(rng.permutation([i for i in range(QUERIES) if i != q])[:POOL].tolist())
        candidates = []
        for n in range(4):
            right = int(rng.random() < 0.4)
            candidates.append(
                {
                    "pointer": rng.permutation(pool)[:2].tolist(),
                    "gen_method": ("beam", "sample")[n % 2],
                    "logprob_score": -float(rng.random()),
                    "vqa_pred_answer": ANSWERS[(topic[q] + (0 if right else 2)) % 4],
                    "vqa_correct": right,
                    "vqa_acc_score": float(right),
                    "vqa_eval_mode": "file" if n else "fallback",
                }
            )
        data[str(q)] = {"pointer_candidates": candidates, "candidate_pool_indices": pool}
    return data


class World:
    """Two stores: one with every place and scorer, one with a/train and the first scorer alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = [Place(folder, d, s) for d in DATASETS for s in SPLITS]
        self.whole, self.alone = folder / "whole", folder / "alone"
        for place in self.places:
            place.write()
            words: tuple[object, ...] = ("--dataset", place.dataset, "--split", place.split)
            own = [place.file("q.json"), place.file("a.json")]
            for store in (self.whole, self.alone) if place.dataset == "a" else (self.whole,):
                lever("ingest", *own, "--store", store, *words)
            for scorer in reversed(SCORERS):  # the one that is chosen is not the newest
                lever("ingest", place.file(f"{scorer}.json"), "--store", self.whole, *words)
        first = self.places[0]
        lever("ingest", first.file("m1.json"), "--store", self.alone, *PLACE)
        for store in (self.whole, self.alone):
            (store / "views").mkdir()
            (store / "views" / "mine.sql").write_text(VIEW)

    @property
    def stores(self) -> tuple[Path, Path]:
        return self.whole, self.alone

    def runs(self, store: Path) -> set[str]:
        return {run.run for run in Store.open(store).runs()}

    def made(self, store: Path, before: set[str]) -> Run:
        (run,) = (r for r in Store.open(store).runs() if r.run not in before)
        return run

    def rows(self, run: Run, table: str, order: list[str]) -> list[dict[str, Any]]:
        """The rows of a run, but for the run's own name."""
        found = pl.concat([pl.from_arrow(pq.read_table(f)) for f in run.table_files(table)])  # type: ignore[type-var]
        assert isinstance(found, pl.DataFrame)
        return found.drop("run", strict=False).sort(order).to_dicts()


def _pools(*steps: int) -> npt.NDArray[np.int64]:
    return np.array([[(q + i) % QUERIES for i in steps] for q in range(QUERIES)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("places"))


def _without_names(value: Any) -> Any:
    """JSON values without what names a store or a run."""
    if isinstance(value, dict):
        hidden = {"run", "runs", "store", "name", "evaluation", "committed_at", "date", "seconds"}
        hidden |= {"sha256"}  # of a manifest, which says when its run was committed
        return {k: _without_names(v) for k, v in value.items() if k not in hidden}
    return [_without_names(v) for v in value] if isinstance(value, list) else value


@pytest.mark.long
def test_training(world: World, tmp_path: Path) -> None:
    """Figures of every step, and the validation's."""
    found = []
    for store in world.stores:
        out = tmp_path / store.name
        words: tuple[object, ...] = (
            "train",
            "--store",
            store,
            "--view",
            "mine",
            "--scorer",
            "m1",
            "--out",
            out,
        )
        words += ("--query-embeddings", world.places[0].file("vectors.npy"), "--hidden-dim", 8)
        lever(*words, "--rce-epochs", 2, "--batch-size", 4)
        found.append(pl.read_parquet(out / "metrics.parquet").drop("run", strict=False))
    assert found[0].equals(found[1])


@pytest.mark.long
def test_a_training_that_mixes_names_what_it_mixes(world: World, tmp_path: Path) -> None:
    base: tuple[object, ...] = (
        "train",
        "--store",
        world.whole,
        "--rce-epochs",
        1,
        "--hidden-dim",
        8,
    )
    base += ("--query-embeddings", world.places[0].file("vectors.npy"), "--out", tmp_path / "o")
    mixed = lever(*base, "--scorer", "m1", check=False)
    assert mixed.returncode == 2 and "a/train" in mixed.stderr and "b/val" in mixed.stderr
    scorers = lever(*base, "--view", "mine", check=False)
    assert scorers.returncode == 2 and "m1" in scorers.stderr and "m2" in scorers.stderr


@pytest.mark.long
def test_audit(world: World, tmp_path: Path) -> None:
    found = []
    for store in world.stores:
        out = tmp_path / f"{store.name}.json"
        words: tuple[object, ...] = (
            "audit",
            "--store",
            store,
            "--view",
            "mine",
            "--scorer",
            "m1",
            "--json",
            out,
        )
        lever(*words, check=False)
        found.append(_without_names(json.loads(out.read_text())))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("pool", [True, long(False)])
def test_generate(world: World, pool: bool) -> None:
    """With pools of the store and of a file: rows are those of the place's own questions."""
    place, found = world.places[0], []
    np.save(
        place.file("pool.npy"),
        _pools(1, 2, 3),
    )
    for store in world.stores:
        before = world.runs(store)
        words: tuple[object, ...] = ("generate", "--store", store, *PLACE, "--num-random", 2)
        words += ("--query-embeddings", place.file("vectors.npy"))
        lever(*words, *(("--pool", place.file("pool.npy")) if pool else ()))
        made = world.made(store, before)
        found.append(world.rows(made, "candidates", ["query_id", "candidate"]))
        Store.open(store).remove(made.run)
    assert found[0] == found[1]


@pytest.mark.long
def test_eval_and_predict(world: World, tmp_path: Path) -> None:
    train, val = world.places[0], world.places[1]
    np.save(
        val.file("pool.npy"),
        _pools(1, 5, 7, 9, 11),
    )
    out = tmp_path / "o"
    words: tuple[object, ...] = (
        "train",
        "--store",
        world.alone,
        "--view",
        "mine",
        "--out",
        out,
        "--hidden-dim",
        8,
    )
    lever(*words, "--query-embeddings", train.file("vectors.npy"), "--rce-epochs", 1)
    shared: tuple[object, ...] = (
        "--dataset",
        "a",
        "--split",
        "val",
        "--checkpoint",
        out / "best.pt",
    )
    shared += ("--query-embeddings", val.file("vectors.npy"), "--pool", val.file("pool.npy"))
    shared += ("--candidate-embeddings", train.file("vectors.npy"))
    figures, picks = [], []
    for store in world.stores:
        report, picked = tmp_path / f"{store.name}.json", tmp_path / f"{store.name}.jsonl"
        before = world.runs(store)
        lever("eval", "--store", store, *shared, "--answerer", "nearest", "--json", report)
        Store.open(store).remove(world.made(store, before).run)
        figures.append(_without_names(json.loads(report.read_text())))
        lever("predict", "--store", store, *shared, "--out", picked)
        picks.append(picked.read_text())
    assert figures[0] == figures[1]
    assert picks[0] == picks[1]


def _run_of(store: Path, scorer: str) -> str:
    """The run of a/train that this model scored."""
    for run in Store.open(store).runs():
        if run.kind == "rl_data" and (run.dataset, run.split) == ("a", "train"):
            scorers = pq.read_table(run.table_files("candidates")[0], columns=["scorer"])
            if scorers.column("scorer")[0].as_py() == scorer:
                return run.run
    raise AssertionError(scorer)


@pytest.mark.long
def test_rescore_and_export(world: World, tmp_path: Path) -> None:
    rescored, exported = [], []
    for store in world.stores:
        run, before = _run_of(store, "m1"), world.runs(store)
        lever("rescore", "--store", store, "--run", run)
        made = world.made(store, before)
        rescored.append(world.rows(made, "candidates", ["query_id", "candidate"]))
        Store.open(store).remove(made.run)
        out = tmp_path / f"{store.name}.json"
        lever("export", "--run", run, "--store", store, "--out", out)
        exported.append(json.loads(out.read_text()))
    assert rescored[0] == rescored[1]
    assert exported[0] == exported[1]


@pytest.mark.long
def test_views_count_each_place_by_itself(world: World) -> None:
    """No view joins, groups or drops rows over the border of a place or of a scorer."""
    from lever_data import connect

    sql = "select * exclude (run) from {view} where dataset = 'a' and split = 'train' order by all"
    whole, alone = connect(world.whole, scorer="m1"), connect(world.alone)
    views = ("all_candidates", "beam", "beam_sample_file_only", "balanced", "learnable", "queries")
    for view in (*views, "examples"):
        asked = sql.format(view=view)
        assert whole.execute(asked).fetchall() == alone.execute(asked).fetchall(), view
    assert lever("check", "--store", world.whole, check=False).returncode == 0


@pytest.mark.long
def test_plan(world: World) -> None:
    found = []
    for store in world.stores:
        words: tuple[object, ...] = ("plan", "--store", store, *PLACE, "--scorer", "m1")
        found.append(json.loads(lever(*words, "--json", "-").stdout))
    assert found[0] == found[1]
    mixed = lever("plan", "--store", world.whole, *PLACE, check=False)
    assert mixed.returncode == 2 and "m1, m2" in mixed.stderr
    places = lever("plan", "--store", world.whole, "--scorer", "m1", check=False)
    assert places.returncode == 2 and "a/train" in places.stderr and "b/val" in places.stderr


@pytest.mark.long
def test_value_and_pack(world: World, tmp_path: Path) -> None:
    vectors, out = world.places[0].file("vectors.npy"), tmp_path / "o"
    shared: tuple[object, ...] = ("--view", "mine", "--query-embeddings", vectors)
    words: tuple[object, ...] = ("--out", out, "--hidden-dim", 8, "--rce-epochs", 1)
    lever("train", "--store", world.alone, *shared, *words)
    values, packs = [], []
    for store in world.stores:
        words = ("value", "--store", store, *shared, "--scorer", "m1", "--least-support", 0)
        words += ("--checkpoint", out / "best.pt", "--json", "-")
        values.append(json.loads(lever(*words).stdout))
        folder = tmp_path / store.name
        words = ("pack", out / "best.pt", "--store", store, "--dataset", "a", "--out", folder)
        lever(*words, "--candidate-embeddings", vectors)
        packs.append(pq.read_table(folder / "pool.parquet"))
    assert values[0] == values[1]
    assert packs[0].equals(packs[1])


@pytest.mark.long
def test_diff(world: World) -> None:
    """Of one run with another; a view that holds answers of two models is nobody's figure."""
    found = []
    for store in world.stores:
        run = _run_of(store, "m1")
        found.append(_without_names(json.loads(lever("diff", run, run, "--store", store,
                                                     "--json", "-").stdout)))  # fmt: skip
    for figures in found:
        del figures["a"], figures["b"]
    assert found[0] == found[1]
    words = ("diff", "mine", "beam", "--store")
    mixed = lever(*words, world.whole, check=False)
    assert mixed.returncode == 2 and "m1, m2" in mixed.stderr
    assert lever(*words, world.alone).returncode == 0
