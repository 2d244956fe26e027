"""Features of pairs, and a whole training of the selector that reads them, at OK-VQA's size.

    python -m benchmarks.features [--questions 9009] [--threads 1] [--json FILE]

Questions with ten annotators each, four vector spaces of width 384, pools of the 64 most similar,
and the reward of every demonstration alone, at about as many queries all of one worth as on OK-VQA.
(a) Features of all pairs, computed, checked and written. (b) A whole training by the recipe of
examples/okvqa_features.toml, from opening the store to its last checkpoint, features at hand.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from benchmarks.measure import Figure, Work, in_turns, print_figures
from lever_data import connect
from lever_data.items.items import Place, load_items
from lever_data.readers.vectors import embedding_batches
from lever_data.store.schema import CANDIDATES, EXAMPLES, QUERIES
from lever_data.store.store import RunSpec, Store
from lever_train.inputs.embeddings import load_embeddings
from lever_train.inputs.pair_features import Pairs, pair_features
from lever_train.learn.train import train
from lever_train.options.pipeline import load_pipeline
from lever_train.options.train import Source, TrainConfig

RECIPE = Path(__file__).resolve().parents[1] / "examples" / "okvqa_features.toml"
SPACES = ("question", "picture", "both", "answer")
DIM, POOL, ANNOTATORS = 384, 64, 10
DATASET, SPLIT = "bench", "train"


def make_store(folder: Path, questions: int) -> TrainConfig:
    """A store of ``questions`` items and all their demonstrations; the recipe that trains on it."""
    rng = np.random.default_rng(0)
    store = Store.create(folder / "store")
    topic = rng.integers(0, max(1, questions // 30), questions)
    spread = rng.geometric(0.35, (questions, ANNOTATORS)) - 1  # most say what is usual for it
    said = (topic[:, None] * 7 + spread * (1 + topic[:, None] % 5)) % 2_000
    odd = np.flatnonzero(rng.random(questions) < 1 / 3)  # nobody else says this: all earn 0
    said[odd] += 2_000 * (1 + odd[:, None])
    centres = rng.normal(size=(topic.max() + 1, DIM))
    for name in SPACES:
        vectors = (centres[topic] + 1.5 * rng.normal(size=(questions, DIM))).astype(np.float32)
        with store.begin(_spec("embeddings", name)) as writer:
            for batch in embedding_batches(vectors, DATASET, SPLIT, name, "bench"):
                writer.write("embeddings", batch)
            writer.commit({"name": name, "width": DIM})
    with store.begin(_spec("examples")) as writer:
        writer.write("examples", _examples(said))
        writer.commit()
    recipe = load_pipeline(RECIPE)
    compared = ",".join(recipe.embed.compared)
    units = normalize(load_embeddings(compared, connect(store, only=["embeddings"])), dim=-1)
    near = units @ units.T
    near.fill_diagonal_(-2)
    pool = near.topk(POOL).indices.numpy()
    np.save(folder / "pool.npy", pool.astype(np.int32))
    with store.begin(_spec("rl_data")) as writer:
        writer.write("candidates", _demonstrations(pool, said))
        writer.write("queries", _table(QUERIES, {"query_id": np.arange(questions)}, questions))
        writer.commit()
    data = {"query_embeddings": compared, "pool": folder / "pool.npy"}
    return recipe.train.model_copy(update={"data": recipe.train.data.model_copy(update=data)})


def _spec(kind: str, name: str = "") -> RunSpec:
    return RunSpec(kind, DATASET, SPLIT, source_sha256=f"{kind}{name}")


def _table(schema: pa.Schema, known: dict[str, Any], rows: int) -> pa.Table:
    named = {"dataset": pa.repeat(DATASET, rows), "split": pa.repeat(SPLIT, rows)} | known
    columns = [
        pa.array(named[f.name], f.type) if f.name in named else pa.nulls(rows, f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _examples(said: np.ndarray) -> pa.Table:
    ids = np.arange(len(said))
    words = [[f"answer {word}" for word in row] for row in said.tolist()]
    known = {
        "example_id": ids,
        "question_id": ids,
        "question": [f"what is number {n}?" for n in ids],
        "answers": words,
        "answer": [row[0] for row in words],
    }
    return _table(EXAMPLES, known, len(said))


def _demonstrations(pool: np.ndarray, said: np.ndarray) -> pa.Table:
    """Every place of every pool as one shot, worth what its answer earns at the query."""
    shown = said[:, 0][pool]
    agree = (said[:, None, :] == shown[..., None]).sum(-1)
    reward = np.minimum(1.0, agree / 3).ravel()
    rows = pool.size
    known = {
        "query_id": np.repeat(np.arange(len(pool)), POOL),
        "candidate": np.tile(np.arange(POOL), len(pool)),
        "shot_num": np.ones(rows, np.int8),
        "pointer": pa.ListArray.from_arrays(
            np.arange(rows + 1, dtype=np.int32), pool.ravel().astype(np.int32)
        ),
        "gen_method": pa.repeat("beam", rows),
        "eval_mode": pa.repeat("file", rows),
        "correct": (reward > 0).astype(np.int8),
        "score": reward,
    }
    return _table(CANDIDATES, known, rows)


def pairs_of(folder: Path, config: TrainConfig) -> Pairs:
    """All queries of the store with their pools."""
    con = connect(Store.open(folder / "store"), only=["embeddings", "examples", "queries"])
    items = load_items(con, Place(DATASET, SPLIT))
    vectors = load_embeddings(str(config.data.query_embeddings), con)
    pool = np.load(folder / "pool.npy").astype(np.int64)
    ids = np.arange(len(pool))
    asked = [items[n].question for n in range(len(pool))]
    place = (DATASET, SPLIT, SPLIT)
    return Pairs(con, place, ids, pool, vectors, vectors, asked, items)


def figures(questions: int) -> Iterator[Figure]:
    """(a) and (b), of a tenth of the questions and of all."""
    sizes = (questions // 10, questions)
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / str(size) for size in sizes]
        recipes = [make_store(folder, size) for folder, size in zip(folders, sizes, strict=True)]
        both = list(zip(sizes, folders, recipes, strict=True))
        computed = [_computing(*known) for known in both]
        for figure in in_turns("features", "pairs", computed, repeats=2):
            yield replace(figure, note="goal 60 s of 576,576 pairs")
        trained = [_training(*known) for known in both]
        for figure in in_turns("features", "queries", trained, repeats=2):
            yield replace(figure, note="goal 3,000/s")


def _computing(questions: int, folder: Path, recipe: TrainConfig) -> Work:
    """Features of all pairs, into an empty store each time."""
    pairs, numbers = pairs_of(folder, recipe), count()

    def work() -> None:
        store = Store.create(folder / f"features-{next(numbers)}")
        pair_features(store, pairs, recipe.model.pair_features, votes=True)

    return "features of pairs", questions * POOL, work


def _training(questions: int, folder: Path, recipe: TrainConfig) -> Work:
    """A whole training; of a tenth so many queries as it reads in its epochs."""
    source, out = Source(store=folder / "store"), folder / "trained"
    groups = recipe.dense.epochs * questions
    return "whole training", groups, lambda: train(source, out, recipe, overwrite=out.exists())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=9_009)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print_figures(figures(given.questions), given.json)


if __name__ == "__main__":
    main()
