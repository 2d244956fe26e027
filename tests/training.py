"""A small training for tests: a store of random candidates, vectors, and the call.

What starts from a finished training takes the fixture ``trained``: one is made per session, and
copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from lever_data.options import options
from lever_data.store.store import Run, Store
from lever_train.learn.train import Advance, TrainResult, train
from lever_train.options.resolve import resolve
from lever_train.options.train import Source, TrainConfig
from tests.stores import candidate, commit, new_store

QUERIES, POOL, WIDTH = 40, 12, 6

# two threads that share two cores with other tests wait for each other at every operation
torch.set_num_threads(1)


def random_rows(
    seed: int = 0, queries: int = QUERIES, shots: Sequence[int] = (2,)
) -> list[dict[str, Any]]:
    """Groups of 2 to 6 candidates; a third of the groups are tied at no reward."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for query in range(queries):
        for ordinal in range(int(rng.integers(2, 7))):
            pool = [item for item in rng.permutation(POOL).tolist() if item != query]
            pointer = pool[: rng.choice(list(shots))]
            right = int(query % 3 > 0 and rng.random() < 0.5)
            rows.append(
                candidate(
                    query,
                    ordinal,
                    pointer,
                    correct=right,
                    score=right * float(rng.choice([0.3, 0.6, 1.0])),
                    logprob_score=float(-rng.random() * 5),
                    gen_method=("beam", "sample", "random")[ordinal % 3],
                    eval_mode="file" if ordinal % 2 else "fallback",
                )
            )
    return rows


class Bench:
    """A store with one run, vectors beside it, and trainings of it."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]] | None = None) -> None:
        self.folder = folder
        self.store: Store = new_store(folder)
        self.run: Run = commit(self.store, random_rows() if rows is None else rows)
        generator = torch.Generator().manual_seed(7)
        self.vectors = folder / "vectors.pt"
        torch.save(torch.randn(QUERIES, WIDTH, generator=generator), self.vectors)

    def copy(self, folder: Path) -> Bench:
        """The same store and trainings in another folder; of the same vectors, to be resumable."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        copied = copy(self)
        copied.folder, copied.store = folder, Store.open(folder / "store")
        return copied

    def flags(self, **flags: object) -> dict[str, object]:
        """Small defaults, and the flags given, by their names on the command line."""
        small: dict[str, object] = {
            "query_embeddings": str(self.vectors),
            "hidden_dim": 8,
            "batch_size": 8,
            "rce_epochs": 2,
        }
        return small | flags

    def train(
        self,
        out: str = "out",
        *,
        resume: bool = False,
        overwrite: bool = False,
        advance: Advance = lambda done, total, note="": None,
        notify: Callable[[str], None] = lambda line: None,
        **flags: object,
    ) -> TrainResult:
        """Train into ``<folder>/<out>``; what is said is kept in ``said``."""
        self.said: list[str] = []

        def say(line: str) -> None:
            self.said.append(line)
            notify(line)

        keys = {o.flag[2:].split("/")[0].replace("-", "_"): o.dotted for o in options(TrainConfig)}
        config = resolve(None, {keys[k]: v for k, v in self.flags(**flags).items()})
        return train(
            Source(store=self.store.path),
            self.folder / out,
            config,
            resume=resume,
            overwrite=overwrite,
            notify=say,
            advance=advance,
        )

    def metrics(self, out: str = "out") -> pl.DataFrame:
        """The table a training left."""
        return pl.read_parquet(self.folder / out / "metrics.parquet")

    def tensors(self, out: str, name: str = "last.pt") -> dict[str, torch.Tensor]:
        """The selector's tensors in a checkpoint."""
        found: dict[str, torch.Tensor] = torch.load(self.folder / out / name, weights_only=True)[
            "model_state_dict"
        ]
        return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def steps_of(table: pl.DataFrame, phase: str, metric: str) -> list[float]:
    """A metric of every step of a phase, in order."""
    rows = table.filter(
        (pl.col("phase") == phase) & (pl.col("metric") == metric) & pl.col("step").is_not_null()
    )
    return rows.sort("step")["value"].to_list()
