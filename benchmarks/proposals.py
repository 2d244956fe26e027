"""Proposals, answers and the cache: how many a second, beside a loop over one query at a time.

    python benchmarks/proposals.py [--queries 2000] [--cache-rows 1000000] [--json FILE]

The reference does what the legacy script does: one query, one sequence and one step at a time, a
forward pass of the selector for each. Ratios are of medians of interleaved repeats in one run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lever_train.history import make_selector
from lever_train.pool import Pool
from lever_train.rollout.answerers.base import Answer
from lever_train.rollout.answerers.nearest import NearestAnswerer
from lever_train.rollout.cache import AnswerCache
from lever_train.rollout.policy import Policy, Similarity, Trained
from lever_train.rollout.prompts import Item, Prompt
from lever_train.rollout.proposals import Ask, propose
from lever_train.rollout.request import Recipe
from lever_train.selector import Selector, SelectorConfig

DIM, POOL, EXAMPLES, REPEATS, BATCH = 512, 64, 9000, 3, 256
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--cache-rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = proposals(options.queries) | answers(20_000) | cache(options.cache_rows)
    print(f"\n| what ({torch.get_num_threads()} threads) | figure |\n|---|---:|")
    for name, value in figures.items():
        print(f"| {name} | {value:,.1f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def proposals(count: int) -> Figures:
    """Queries/s at a pool of 64, ten candidates each."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    table = torch.randn(EXAMPLES, DIM)
    pool = np.stack([rng.choice(EXAMPLES, POOL, replace=False) for _ in range(count)])
    model = make_selector(SelectorConfig(dim=DIM)).eval()
    policies: dict[str, Policy] = {
        "similarity": Similarity(),
        "selector": Trained("bench", make_selector(model.config).eval().double()),
    }
    few = 8
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "one at a time (2 shots)": (
            few,
            lambda: [one(model, table, q, pool[q]) for q in range(few)],
        )
    }
    for name, policy in policies.items():
        for shots in (2, 4):
            recipe = Recipe(shot_num=shots)
            work[f"{name} ({shots} shots)"] = (
                count,
                lambda p=policy, r=recipe: batched(p, r, table, pool),  # type: ignore[misc]
            )
    rates = interleaved(work)
    found = {f"proposals, {name}: queries/s": rate for name, rate in rates.items()}
    ratio = rates["selector (2 shots)"] / rates["one at a time (2 shots)"]
    return found | {"proposals, selector against one at a time: times": ratio}


def batched(policy: Policy, recipe: Recipe, table: torch.Tensor, pool: np.ndarray) -> None:
    for start in range(0, len(pool), BATCH):
        ids = np.arange(start, min(start + BATCH, len(pool)))
        propose(policy, Ask(ids, table[ids], table, pool[ids], own=True), recipe)


@torch.no_grad()
def one(model: Selector, table: torch.Tensor, query: int, pool: np.ndarray) -> list[list[int]]:
    """Five beams, four samples and a random pair for one query, a forward pass for every step."""
    vectors, asked = table[torch.from_numpy(pool)], table[query : query + 1]

    def step(chosen: list[int], temperature: float = 1.0) -> torch.Tensor:
        scores = model.scores(asked, Pool.of(vectors[None].clone()))[0] / temperature
        scores[chosen] = -100.0
        return scores.softmax(-1)

    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(2):
        grown = []
        for total, chosen in beams:
            best = step(chosen).topk(5)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                grown.append((total + float(np.log(value)), [*chosen, index]))
        beams = sorted(grown, key=lambda b: -b[0])[:5]
    found = [chosen for _, chosen in beams]
    for temperature in (1.0, 1.0, 1.3, 1.3):
        sequence: list[int] = []
        for _ in range(2):
            sequence.append(int(torch.multinomial(step(sequence, temperature), 1)))
        found.append(sequence)
    return [*found, torch.randperm(POOL)[:2].tolist()]


def answers(count: int) -> Figures:
    """Answers/s of the nearest answerer with five probabilities each, 2 shots."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((EXAMPLES, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    words = [f"word {n}" for n in range(200)]
    items = [
        Item("d", "s", n, "q?", tuple(rng.choice(words, 10).tolist()), "x") for n in range(EXAMPLES)
    ]
    prompts = [
        Prompt(items[q], (items[a], items[b]), tuple(words[:5]))
        for q, a, b in rng.integers(0, EXAMPLES, (count, 3)).tolist()
    ]
    answerer = NearestAnswerer(vectors, vectors)
    rates = interleaved({"nearest": (count, lambda: answerer.answer(prompts))})
    return {"nearest: answers/s": rates["nearest"]}


def cache(rows: int) -> Figures:
    """Rows/s put (in shards of 2,500, each looked up before) and found again."""
    with tempfile.TemporaryDirectory() as folder:
        writing = AnswerCache(Path(folder) / "c")
        keys = [hashlib.sha256(str(n).encode()).digest() for n in range(rows)]
        start = time.perf_counter()
        for first in range(0, rows, 2500):
            part = keys[first : first + 2500]
            writing.get(part)
            for key in part:
                writing.put(key, Answer("pony tail\n", (-0.1, -2.3)))
            writing.flush()
        put = rows / (time.perf_counter() - start)
        start = time.perf_counter()
        reading = AnswerCache(Path(folder) / "c")
        for first in range(0, rows, 2500):
            reading.get(keys[first : first + 2500])
        return {
            f"cache of {rows:,}: put, rows/s": put,
            f"cache of {rows:,}: found, rows/s": rows / (time.perf_counter() - start),
        }


def interleaved(work: dict[str, tuple[int, Callable[[], object]]]) -> Figures:
    """Units/s of each piece of work: the median of repeats that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(REPEATS + 1):
        for name, (_, call) in work.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: count / statistics.median(seconds[name]) for name, (count, _) in work.items()}


if __name__ == "__main__":
    main()
