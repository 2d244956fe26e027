"""Speed and memory of the trainer, on this machine, in one run.

    python -m benchmarks.train [a b d] [--threads 2] [--candidates 20000000]

(a) a pool of 64 per query, 15 candidates, d 512, against a plain loop that does what the legacy
trainer does: batch 1, the pool copied once per candidate. (b) the same with one shared pool of
6,000. (c) the share of an epoch that data loading takes. (d) peak memory of an epoch over a store
of 20 million candidates, and of 2 million. Prints one table; docs/lab.md keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import PER_QUERY
from benchmarks.measure import Figure, against, in_turns, print_figures, python, run
from lever_data.store.schema import CANDIDATES, QUERIES
from lever_data.store.store import RunSpec, Store
from lever_train.learn.batch import Batch, Loader
from lever_train.learn.data import open_data
from lever_train.learn.setup import new_selector
from lever_train.learn.step import Learner, Phase
from lever_train.options.resolve import resolve
from lever_train.options.train import Source

SHOTS, DIM = 2, 512
BATCH = 512  # of ours; the legacy loop has 1
STEPS = 100  # of the legacy loop


class LegacyLoop:
    """The selector as torch's own modules, one query a step, the pool expanded per candidate."""

    def __init__(self, dim: int, hidden: int = 256) -> None:
        torch.manual_seed(0)
        self.inward = nn.Linear(dim, hidden, bias=False)
        self.attention = nn.MultiheadAttention(hidden, 1, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(hidden)
        self.query_proj = nn.Linear(hidden, hidden, bias=False)
        self.cand_proj = nn.Linear(hidden, hidden, bias=False)
        modules = (self.inward, self.attention, self.norm, self.query_proj, self.cand_proj)
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self, query: Tensor, pool: Tensor, labels: Tensor, reward: Tensor) -> float:
        """query [d], pool [K, d], labels [N, S], reward [N]: one RCE step."""
        count = len(labels)
        q = self.inward(query[None].expand(count, -1))
        c = self.inward(pool[None].expand(count, -1, -1).clone())
        q = self.norm(self.attention(q[:, None], c, c)[0][:, 0] + q)
        q = functional.normalize(functional.dropout(self.query_proj(q), 0.1), dim=-1)
        c = functional.normalize(functional.dropout(self.cand_proj(c), 0.1), dim=-1)
        logits = torch.einsum("nh,nkh->nk", q, c) / 0.1
        total = torch.zeros(count)
        for t in range(labels.shape[1]):
            total = total + functional.cross_entropy(
                logits, labels[:, t], reduction="none", label_smoothing=0.1
            )
            logits = logits.scatter(1, labels[:, t : t + 1], -100.0)
        loss = ((reward / 1.0).softmax(0) * total).sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(loss.detach())


def synthetic_store(folder: Path, queries: int, examples: int, pool: int | None) -> dict[str, Any]:
    """A store of random candidates; returns the flags that train on it."""
    rng = np.random.default_rng(0)
    store = Store.create(folder / "store")
    pools = None
    if pool is not None:
        start = rng.integers(0, examples - pool, queries)
        pools = (start[:, None] + np.arange(pool)).astype(np.int32)  # neighbours: pools overlap
        np.save(folder / "pool.npy", pools)
    with store.begin(
        RunSpec("rl_data", "bench", "train", source_sha256=f"{queries}-{examples}-{pool}")
    ) as writer:
        for first in range(0, queries, 20_000):
            ids = np.arange(first, min(first + 20_000, queries))
            writer.write("candidates", _candidates(rng, ids, pools, examples))
            writer.write("queries", _queries(ids))
        writer.commit()
    return {"data.pool": str(folder / "pool.npy")} if pools is not None else {}


def _candidates(
    rng: np.random.Generator, ids: np.ndarray, pools: np.ndarray | None, examples: int
) -> pa.Table:
    rows = len(ids) * PER_QUERY
    width = examples if pools is None else pools.shape[1]
    first = rng.integers(0, width, rows)
    places = np.stack([first, (first + rng.integers(1, width, rows)) % width], axis=1)
    query = np.repeat(ids, PER_QUERY)
    pointer = places if pools is None else np.take_along_axis(pools[query], places, axis=1)
    right = rng.random(rows) < 0.3
    offsets = pa.array(np.arange(0, rows * SHOTS + 1, SHOTS, dtype=np.int32))
    known = {
        "dataset": pa.array(["bench"] * rows),
        "split": pa.array(["train"] * rows),
        "query_id": pa.array(query),
        "candidate": pa.array(np.tile(np.arange(PER_QUERY, dtype=np.int32), len(ids))),
        "shot_num": pa.array(np.full(rows, SHOTS, dtype=np.int8)),
        "pointer": pa.ListArray.from_arrays(offsets, pa.array(pointer.ravel().astype(np.int32))),
        "gen_method": pa.array(["beam"] * rows),
        "eval_mode": pa.array(["file"] * rows),
        "correct": pa.array(right.astype(np.int8)),
        "score": pa.array(right * rng.choice([0.3, 0.6, 1.0], rows)),
    }
    columns = [known.get(f.name, pa.nulls(rows, f.type)) for f in CANDIDATES]
    return pa.Table.from_arrays(columns, schema=CANDIDATES)


def _queries(ids: np.ndarray) -> pa.Table:
    known = {
        "dataset": pa.array(["bench"] * len(ids)),
        "split": pa.array(["train"] * len(ids)),
        "query_id": pa.array(ids),
    }
    columns = [known.get(f.name, pa.nulls(len(ids), f.type)) for f in QUERIES]
    return pa.Table.from_arrays(columns, schema=QUERIES)


def open_training(
    folder: Path, flags: dict[str, Any], rows: int, dim: int
) -> tuple[Loader, Learner]:
    """A loader and a learner on the synthetic store, as ``lever train`` makes them."""
    torch.manual_seed(1)
    torch.save(torch.randn(rows, dim), folder / "vectors.pt")
    config = resolve(
        None,
        flags
        | {
            "data.query_embeddings": str(folder / "vectors.pt"),
            "data.split_ratio": 1.0,
            "run.tied_groups": "keep",
            "run.batch_size": BATCH,
        },
    )
    data = open_data(Source(store=folder / "store"), config)
    selector, config = new_selector(config, dim, lambda line: None)
    loader = Loader(data, torch.device("cpu"), batch_size=BATCH)
    steps = -(-data.census.groups // BATCH)
    return loader, Learner(Phase("rce", 0, 1), selector, loader, config, steps=steps)


def epoch(loader: Loader, learner: Learner) -> None:
    """One epoch as the trainer runs it, loading included."""
    for step, batch in enumerate(loader.batches(loader.data.train)):
        learner.step(batch, step)


def load(loader: Loader) -> None:
    """The loading of an epoch alone."""
    for _ in loader.batches(loader.data.train):
        pass


def legacy(loop: LegacyLoop, loader: Loader, batch: Batch, steps: int) -> None:
    """So many steps of the legacy loop on the queries of a batch."""
    query, pools = loader.vectors(batch)
    for row in range(steps):
        pool = pools.vectors
        if pools.index is not None:
            pool = pool[pools.index[row]]
        loop.step(query[row], pool, batch.positions[row], batch.reward[row].float())


def compare(case: str, queries: int, examples: int, pool: int | None, goal: str) -> list[Figure]:
    """(a) and (b): an epoch of ours and of a tenth, steps of the legacy loop, (c) loading alone."""
    with tempfile.TemporaryDirectory() as large, tempfile.TemporaryDirectory() as small:
        opened = []
        for folder, count in ((large, queries), (small, queries // 10)):
            flags = synthetic_store(Path(folder), count, examples, pool)
            opened.append(open_training(Path(folder), flags, max(queries, examples), DIM))
        (loader, learner), tenth = opened
        loop = LegacyLoop(loader.queries.shape[1])
        batch = next(iter(loader.batches(loader.data.train)))
        steps = min(STEPS if pool else 2, queries // 100)
        ours, old, smaller, loading = in_turns(
            "training",
            "queries",
            [
                (case, queries, lambda: epoch(loader, learner)),
                (f"{case}: legacy loop", steps, lambda: legacy(loop, loader, batch, steps)),
                (case, queries // 10, lambda: epoch(*tenth)),
                (f"{case}: loading alone", queries, lambda: load(loader)),
            ],
        )
    share = f"{loading.seconds / ours.seconds:.1%} of the epoch"
    ours, loading = replace(ours, note=goal), replace(loading, note=share)
    return [*against(ours, [old, loading]), smaller]


def memory(candidates: int) -> Iterator[Figure]:
    """(d): an epoch over a large store in a process of its own, whose peak is measured."""
    queries = candidates // PER_QUERY
    with tempfile.TemporaryDirectory() as folder:
        synthetic_store(Path(folder), queries, 20_000, 64)
        words = python("benchmarks.train", "inside", "--folder", folder, "--queries", str(queries))
        found = run(words, watch=False).said
    note = f"{found['candidates']:,} candidates, beside {found['vectors']:,} MB of vectors"
    peak = found["peak"] - found["vectors"]
    case = "large store, d 32"
    ours = Figure("training", case, queries, "queries", found["seconds"], 1, peak, note=note)
    old = replace(ours, case=f"{case}: legacy loop", size=STEPS, seconds=found["legacy"])
    return against(ours, [replace(old, peak_mb=None, note="")])


def inside(folder: Path, queries: int) -> dict[str, float]:
    """The inside of (d): small vectors, so that what is measured is the stream. Megabytes."""
    flags: dict[str, Any] = {"data.pool": str(folder / "pool.npy"), "model.hidden": 32}
    loader, learner = open_training(folder, flags, queries, 32)
    started = time.perf_counter()
    epoch(loader, learner)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    batch = next(iter(loader.batches(loader.data.train)))
    loop = LegacyLoop(32, hidden=32)
    started = time.perf_counter()
    legacy(loop, loader, batch, STEPS)
    return {
        "candidates": loader.data.census.rows,
        "seconds": seconds,
        "legacy": time.perf_counter() - started,
        "peak": round(peak),
        "vectors": round(loader.queries.numel() * 4 / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["a", "b"], choices=["a", "b", "d", "inside"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--queries", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.folder is not None:
        print(json.dumps(inside(given.folder, given.queries)))
        return
    figures: list[Figure] = []
    if "a" in given.parts:
        figures += compare("pool of 64 per query, d 512", 12_000, 9_000, 64, "goal 50 x")
    if "b" in given.parts:
        figures += compare("shared pool of 6,000, d 512", 6_000, 6_000, None, "goal 1,000 x")
    if "d" in given.parts:
        figures += memory(given.candidates // 10)
        goal, *old = memory(given.candidates)
        figures += [replace(goal, note=f"{goal.note}; goal 2,000 MB"), *old]
    print_figures(figures, given.json)


if __name__ == "__main__":
    main()
