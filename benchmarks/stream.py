"""View → tensors, against what people do without lever: the same batches of the same candidates.

    python -m benchmarks.stream CONTENDER STORE JSON      one contender, one line of JSON
    python -m benchmarks.run --only stream                all of them, interleaved

Every contender shuffles the queries, computes the reward (hard + soft), maps pointers to positions
in the shared pool, and makes padded tensors of 128 queries: positions [B, N, S] int64, mask [B, N],
reward [B, N] float64. They must agree on the number of candidates and the sum of rewards.
``seconds`` runs from opening the data to the last batch; imports are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH = 128
Tensors = tuple[Tensor, Tensor, Tensor]  # positions, mask, reward


def lever(store: Path, source: Path) -> Iterator[Tensors]:
    """Ours: a snapshot of the view, read in a random order, batch.collate."""
    from lever_data.relations.db import open_session
    from lever_data.relations.reward_spec import RewardSpec
    from lever_data.relations.rewards import reward_sql
    from lever_data.relations.snapshot import open_snapshot
    from lever_data.relations.stream import Selection
    from lever_train.inputs.pools import SharedPool
    from lever_train.learn.batch import collate

    con = open_session(store, only=["all_candidates"]).con
    ids = con.execute(
        "select distinct unnest(pointer) as id from all_candidates order by id"
    ).fetchnumpy()["id"]
    selection = Selection(("all_candidates",), reward_sql(RewardSpec()))
    pool = SharedPool(ids.astype(np.int64))
    snapshot = open_snapshot(con, selection)
    groups = snapshot.order(con, snapshot.groups_of(con, None))
    for batch in collate(snapshot, groups, pool, BATCH):
        yield batch.positions, batch.mask, batch.reward


def python_loop(store: Path, source: Path) -> Iterator[Tensors]:
    """The legacy way: json.load, then a loop over queries and candidates."""
    with source.open(encoding="utf-8") as file:
        data = json.load(file)
    groups = [value["pointer_candidates"] for value in data.values()]
    ids = sorted({i for group in groups for c in group for i in c["pointer"]})
    place = {example: position for position, example in enumerate(ids)}
    random.Random(0).shuffle(groups)
    for first in range(0, len(groups), BATCH):
        chosen = groups[first : first + BATCH]
        width = max(map(len, chosen))
        positions = torch.zeros(len(chosen), width, 2, dtype=torch.int64)
        mask = torch.zeros(len(chosen), width, dtype=torch.bool)
        reward = torch.zeros(len(chosen), width, dtype=torch.float64)
        for row, group in enumerate(chosen):
            pointers = [[place[i] for i in c["pointer"]] for c in group]
            rewards = [c["vqa_correct"] + c["vqa_acc_score"] for c in group]
            positions[row, : len(group)] = torch.tensor(pointers)
            mask[row, : len(group)] = True
            reward[row, : len(group)] = torch.tensor(rewards, dtype=torch.float64)
        yield positions, mask, reward


def polars(store: Path, source: Path) -> Iterator[Tensors]:
    """Plain polars over the same Parquet files: sort by a hash of the query, then numpy. Failed
    evaluations and pointers that hold the query itself are left out, as in all_candidates."""
    import polars as pl

    found = (
        pl.scan_parquet(store / "runs" / "*" / "candidates" / "*.parquet", hive_partitioning=False)
        .filter(
            ~pl.col("eval_failed").fill_null(False)
            & ~pl.col("pointer").list.contains(pl.col("query_id"))
        )
        .select(
            "query_id",
            "candidate",
            "pointer",
            reward=pl.col("correct").fill_null(0) + pl.col("score").fill_null(0),
        )
        .sort(pl.col("query_id").hash(0), "query_id", "candidate")
        .collect()
    )
    pointer = found["pointer"].explode(empty_as_null=False).to_numpy().reshape(len(found), 2)
    yield from _slices(found["query_id"].to_numpy(), pointer, found["reward"].to_numpy())


def hf_datasets(store: Path, source: Path) -> Iterator[Tensors]:
    """Hugging Face datasets over the same Parquet files: rows of 128 random queries by index."""
    import datasets

    datasets.disable_progress_bars()
    files = sorted(map(str, store.glob("runs/*/candidates/*.parquet")))
    columns = ["query_id", "pointer", "correct", "score"]
    found = datasets.Dataset.from_parquet(
        files, columns=columns, cache_dir=str(store.parent / "hf")
    ).with_format("numpy")
    query = np.asarray(found["query_id"][:])
    starts = np.append(np.flatnonzero(np.diff(query, prepend=-1)), len(query))
    ids = np.unique(np.concatenate(list(found["pointer"][:])))
    order = np.random.default_rng(0).permutation(len(starts) - 1)
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        rows = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in chosen])
        part: Any = found[rows]
        pointer = np.searchsorted(ids, np.stack(list(part["pointer"])))
        reward = part["correct"] + part["score"]
        yield _pad(starts[chosen + 1] - starts[chosen], pointer, reward)


def _slices(
    query: np.ndarray[Any, Any], pointer: np.ndarray[Any, Any], reward: np.ndarray[Any, Any]
) -> Iterator[Tensors]:
    """Batches of 128 groups that stand together."""
    ids = np.unique(pointer)
    places = np.searchsorted(ids, pointer)
    starts = np.append(np.flatnonzero(np.diff(query, prepend=query[0] - 1)), len(query))
    for first in range(0, len(starts) - 1, BATCH):
        bounds = starts[first : first + BATCH + 1]
        rows = slice(bounds[0], bounds[-1])
        yield _pad(np.diff(bounds), places[rows], reward[rows])


def _pad(
    sizes: np.ndarray[Any, Any], places: np.ndarray[Any, Any], reward: np.ndarray[Any, Any]
) -> Tensors:
    """Flat rows of groups of these sizes as padded tensors."""
    width = int(sizes.max())
    mask = np.arange(width) < sizes[:, None]
    positions = np.zeros((*mask.shape, 2), dtype=np.int64)
    rewards = np.zeros(mask.shape)
    positions[mask], rewards[mask] = places, reward
    return torch.from_numpy(positions), torch.from_numpy(mask), torch.from_numpy(rewards)


CONTENDERS: dict[str, Callable[[Path, Path], Iterator[Tensors]]] = {
    "lever": lever,
    "polars": polars,
    "datasets": hf_datasets,
    "json loop": python_loop,
}

IMPORTS = {
    "lever": (
        "lever_data.relations.db",
        "lever_data.relations.rewards",
        "lever_data.relations.snapshot",
        "lever_train.learn.batch",
        "lever_train.inputs.pools",
    ),
    "polars": ("polars",),
    "datasets": ("datasets",),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("store", type=Path)
    parser.add_argument("source", type=Path)
    given = parser.parse_args()
    for module in IMPORTS.get(given.contender, ()):
        import_module(module)
    started = time.perf_counter()
    candidates, total = 0, 0.0
    for positions, mask, reward in CONTENDERS[given.contender](given.store, given.source):
        assert positions.shape[:2] == mask.shape == reward.shape
        candidates += int(mask.sum())
        total += float(reward.sum())
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "candidates": candidates, "reward": round(total, 3)}))


if __name__ == "__main__":
    main()
