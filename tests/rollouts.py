"""A small visual-question world on disk for rollout tests: official files, embeddings, pools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lever_data.store.store import Run
from lever_train.options.rollout import AnswererSpec, Inputs, Recipe, Request, Which

ANSWERS = ("red", "blue", "two", "a dog", "tennis", "yes", "pizza", "train")


@dataclass(frozen=True)
class World:
    """Files of ``queries`` questions of dataset ``d``, split ``train``; pools of 12."""

    folder: Path
    queries: int

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def questions(self) -> Path:
        return self.folder / "questions.json"

    @property
    def annotations(self) -> Path:
        return self.folder / "annotations.json"

    @property
    def embeddings(self) -> Path:
        return self.folder / "vectors.npy"

    @property
    def pool(self) -> Path:
        return self.folder / "pool.npy"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def request(self, **changes: Any) -> Request:
        """The plain rollout; ``changes`` are fields of any part of the request."""
        models = {"which": Which, "inputs": Inputs, "recipe": Recipe, "answerer": AnswererSpec}
        parts: dict[str, Any] = {name: {} for name in models}
        parts["which"] = {"store": self.store, "dataset": "d", "split": "train"}
        parts["inputs"] = {
            "query_embeddings": str(self.embeddings),
            "pool": self.pool,
            "questions": self.questions,
            "annotations": self.annotations,
        }
        own: dict[str, Any] = {"shard_size": 8}
        for name, value in changes.items():
            owner = next((p for p, m in models.items() if name in m.model_fields), None)
            (own if owner is None or name == "shot_num" else parts[owner])[name] = value
        return Request(**own, **{p: models[p](**parts[p]) for p in models})

    def argv(self, *more: str | Path, store: str | Path | None = None) -> list[str]:
        """The plain rollout as a command line, in another store where one is named."""
        words = ["generate", "--store", store or self.store, "--dataset", "d", "--split", "train"]
        words += ["--pool", self.pool, "--query-embeddings", self.embeddings]
        words += ["--questions", self.questions, "--annotations", self.annotations]
        return [str(w) for w in [*words, "--shard-size", "8", *more]]


def make_world(folder: Path, queries: int = 40, seed: int = 0) -> World:
    """Write the files. Neighbours in the embedding often share an answer."""
    world = World(folder, queries)
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, len(ANSWERS), queries)
    vectors = np.eye(len(ANSWERS), 16)[topic] + 0.35 * rng.standard_normal((queries, 16))
    np.save(world.embeddings, vectors.astype(np.float32))
    similar = np.argsort(-(vectors @ vectors.T), axis=1, kind="stable")
    pool = [[j for j in row if j != q][:12] for q, row in enumerate(similar.tolist())]
    np.save(world.pool, np.array(pool, dtype=np.int16))
    asked = [
        {"question_id": 1000 + q, "image_id": q, "question": f"what is number {q}?"}
        for q in range(queries)
    ]
    noted = [
        {"question_id": 1000 + q, "answers": [{"answer": a} for a in _said(rng, topic[q])]}
        for q in range(queries)
    ]
    world.questions.write_text(json.dumps({"questions": asked}))
    world.annotations.write_text(json.dumps({"annotations": noted}))
    return world


def add_images(world: World) -> None:
    """An image for every item, under the name COCO gives it."""
    world.images.mkdir()
    rng = np.random.default_rng(0)
    for q in range(world.queries):
        pixels = rng.integers(0, 255, (40 + q, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(world.images / f"COCO_train2014_{q:012d}.jpg")


def rows(run: Run | None, table: str = "candidates") -> list[dict[str, Any]]:
    """A committed run's rows."""
    assert run is not None
    found: list[dict[str, Any]] = pa.concat_tables(
        pq.read_table(f, partitioning=None) for f in run.table_files(table)
    ).to_pylist()
    return found


def _said(rng: np.random.Generator, topic: int) -> list[str]:
    other = ANSWERS[int(rng.integers(len(ANSWERS)))]
    agree = int(rng.integers(4, 11))
    return [ANSWERS[topic]] * agree + [other] * (10 - agree)
