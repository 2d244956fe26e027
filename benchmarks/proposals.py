"""Proposals, answers and the cache: how many a second, beside a loop over one query at a time.

    python -m benchmarks.proposals [--queries 2000] [--cache-rows 1000000] [--json FILE]

The reference does what the legacy script does: one query, one sequence and one step at a time, a
forward pass of the selector for each. Ratios are of medians of interleaved repeats in one run.
"""

from __future__ import annotations

import argparse
import hashlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import Figure, Work, against, in_turns, print_figures
from lever_data.items.prompts import Item, Prompt
from lever_train.options.rollout import Recipe
from lever_train.options.train import ModelConfig
from lever_train.rollout.answerers.base import Answer
from lever_train.rollout.answerers.nearest import NearestAnswerer
from lever_train.rollout.cache import AnswerCache
from lever_train.rollout.policy import Policy, SelectorPolicy, Similarity
from lever_train.rollout.propose import Ask, propose
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Pool

DIM, POOL, EXAMPLES, BATCH = 512, 64, 9000, 256
Scores = Callable[[Tensor, Tensor], Tensor]  # query [d], pool [K, d] → [K]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--cache-rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [*proposals(options.queries), *answers(20_000), *cache(options.cache_rows)]
    print_figures(found, options.json)


def proposals(queries: int) -> Iterator[Figure]:
    """Ten candidates for each of ``queries`` from a pool of 64, by both policies, and of a tenth.

    Beside each the same scores for one query at a time.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    table = torch.randn(EXAMPLES, DIM)
    pool = np.stack([rng.choice(EXAMPLES, POOL, replace=False) for _ in range(queries)])
    model = make_selector(DIM, ModelConfig()).eval()
    trained = SelectorPolicy("bench", make_selector(DIM, model.config).eval().double())

    @torch.no_grad()
    def by_selector(query: Tensor, vectors: Tensor) -> Tensor:
        return model.begin(query[None], Pool(vectors.clone())).scores()[0, 0]

    def by_similarity(query: Tensor, vectors: Tensor) -> Tensor:
        return functional.cosine_similarity(query[None], vectors) / 0.1

    policies: list[tuple[str, Policy, Scores]] = [
        ("selector", trained, by_selector),
        ("similarity", Similarity(), by_similarity),
    ]
    few, work = 8, list[Work]()
    for (name, policy, scores), shots in product(policies, (2, 4)):
        case, recipe = f"{name}, {shots} shots", Recipe(shot_num=shots)
        all_at_once = partial(batched, policy, recipe, table)
        work += [
            (case, queries, partial(all_at_once, pool)),
            (f"{case}, one query at a time", few, partial(each, scores, table, pool[:few], shots)),
            (case, queries // 10, partial(all_at_once, pool[: queries // 10])),
        ]
    found = in_turns("proposals", "queries", work)
    found[0] = replace(found[0], note="goal 2,000/s")
    for ours, alone, tenth in zip(found[::3], found[1::3], found[2::3], strict=True):
        yield from (*against(ours, [alone]), tenth)


def batched(policy: Policy, recipe: Recipe, table: Tensor, pool: np.ndarray) -> None:
    for start in range(0, len(pool), BATCH):
        ids = np.arange(start, min(start + BATCH, len(pool)))
        propose(policy, Ask(ids, table[ids], table, pool[ids], own=True), recipe)


def each(scores: Scores, table: Tensor, pool: np.ndarray, shots: int) -> None:
    for query, row in enumerate(pool):
        one(partial(scores, table[query], table[torch.from_numpy(row)]), shots)


def one(scores: Callable[[], Tensor], shots: int) -> list[list[int]]:
    """Five beams, four samples and a random pick for one query, its scores anew at every step."""

    def step(chosen: list[int], temperature: float = 1.0) -> Tensor:
        given = scores() / temperature
        given[chosen] = -100.0
        return given.softmax(-1)

    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(shots):
        grown = []
        for total, chosen in beams:
            best = step(chosen).topk(5)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                grown.append((total + float(np.log(value)), [*chosen, index]))
        beams = sorted(grown, key=lambda b: -b[0])[:5]
    found = [chosen for _, chosen in beams]
    for temperature in (1.0, 1.0, 1.3, 1.3):
        sequence: list[int] = []
        for _ in range(shots):
            sequence.append(int(torch.multinomial(step(sequence, temperature), 1)))
        found.append(sequence)
    return [*found, torch.randperm(POOL)[:shots].tolist()]


def answers(number: int) -> Iterator[Figure]:
    """The nearest answerer, five probabilities an answer, 2 shots: in batches and one by one."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((EXAMPLES, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    words = [f"word {n}" for n in range(200)]
    items = [
        Item("d", "s", n, "q?", tuple(rng.choice(words, 10).tolist()), "x") for n in range(EXAMPLES)
    ]
    prompts = [
        Prompt(items[q], (items[a], items[b]), tuple(words[:5]))
        for q, a, b in rng.integers(0, EXAMPLES, (number, 3)).tolist()
    ]
    answerer = NearestAnswerer(vectors, vectors)
    few = number // 20
    ours, others = in_turns(
        "answers",
        "answers",
        [
            ("nearest", number, lambda: answerer.answer(prompts)),
            ("nearest, one by one", few, lambda: [answerer.answer([p]) for p in prompts[:few]]),
        ],
    )
    return against(ours, [others])


def cache(rows: int) -> Iterator[Figure]:
    """The cache of answers beside SQLite: put (looked up before) and found, 2,500 at a time."""
    keys = [hashlib.sha256(str(n).encode()).digest() for n in range(rows)]
    parts = [keys[first : first + 2500] for first in range(0, rows, 2500)]
    with tempfile.TemporaryDirectory() as name:
        folders = (Path(name) / str(n) for n in count())
        put, put_sqlite, found, found_sqlite = in_turns(
            "answer cache",
            "rows",
            [
                ("put", rows, lambda: put_all(next(folders), parts)),
                ("SQLite, put", rows, lambda: put_all_sqlite(Path(name) / "db", parts)),
                ("found", rows, lambda: find_all(Path(name) / "0", parts)),
                ("SQLite, found", rows, lambda: find_all_sqlite(Path(name) / "db", parts)),
            ],
        )
    yield from against(put, [put_sqlite])
    yield from against(found, [found_sqlite])


def put_all(folder: Path, parts: list[list[bytes]]) -> None:
    writing = AnswerCache(folder)
    for part in parts:
        writing.get(part)
        for key in part:
            writing.put(key, Answer("pony tail\n", (-0.1, -2.3)))
        writing.flush()


def find_all(folder: Path, parts: list[list[bytes]]) -> None:
    reading = AnswerCache(folder)
    for part in parts:
        assert all(reading.get(part))


def put_all_sqlite(path: Path, parts: list[list[bytes]]) -> None:
    path.unlink(missing_ok=True)
    con = sqlite3.connect(path)
    con.execute("create table answers (key blob primary key, text text, a real, b real)")
    for part in parts:
        find_sqlite(con, part)
        rows = [(key, "pony tail\n", -0.1, -2.3) for key in part]
        con.executemany("insert into answers values (?, ?, ?, ?)", rows)
        con.commit()  # flushed to disk, as ours is
    con.close()


def find_all_sqlite(path: Path, parts: list[list[bytes]]) -> None:
    con = sqlite3.connect(path)
    for part in parts:
        assert len(find_sqlite(con, part)) == len(part)
    con.close()


def find_sqlite(con: sqlite3.Connection, part: list[bytes]) -> list[Answer]:
    places = ", ".join("?" * len(part))
    found = con.execute(f"select text, a, b from answers where key in ({places})", part)
    return [Answer(text, (a, b)) for text, a, b in found]


if __name__ == "__main__":
    main()
