"""Picks of packed selectors: one question at a time, and 2,000 at once.

    python -m benchmarks.pack [--examples 10000] [--cells] [--json FILE]

Every kind of step (static, gru, gated, features with votes of answers) of width 384, chooses two
from a pool of 64: one that all questions share, and the nearest of the examples. Vectors are drawn
around a centre each fifty; seconds are those of the clock, and a note says how long the slowest of
a hundred questions took, by the clock and of processor time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn.functional import normalize

from benchmarks.measure import Figure, in_turns, print_figures
from lever_data import catalog
from lever_data.relations.features import sha256
from lever_train.options.train import ModelConfig
from lever_train.pack.cells import Cells
from lever_train.pack.features import PackedFeatures
from lever_train.pack.packed import PackedSelector
from lever_train.rollout.policy import SelectorPolicy
from lever_train.selector.kinds import make_selector

DIM, POOL, SHOTS, ONE_BY_ONE = 384, 64, 2, 200
KINDS = ("static", "gru", "gated", "features")


def vectors(count: int, seed: int) -> torch.Tensor:
    """Vectors [count, DIM] around centres that do not depend on the seed."""
    centres = torch.randn(max(1, count // 50), DIM, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    at = torch.randint(len(centres), (count,), generator=draw)
    return centres[at] + 0.7 * torch.randn(count, DIM, generator=draw)


@cache
def examples(count: int) -> pa.Table:
    """``count`` examples of ten answers each, of 2,000 words that are as frequent as words are."""
    codes = np.random.default_rng(0).zipf(1.3, (count, 10)) % 2_000
    words = pa.array([f"answer {n}" for n in range(2_000)])
    numbers = pa.array(np.arange(count))
    return pa.table(
        {
            "example_id": numbers,
            "question": pc.binary_join_element_wise("what is", numbers.cast(pa.string()), " "),
            "answers": pa.ListArray.from_arrays(
                np.arange(0, 10 * count + 1, 10, dtype=np.int32), words.take(codes.ravel())
            ),
            "answer": words.take(codes[:, 0]),
        }
    )


@cache
def places(count: int, *, cells: bool) -> tuple[torch.Tensor, Cells | None]:
    """The examples' vectors and, if asked for, their cells."""
    shown = vectors(count, 1)
    return shown, Cells.of(normalize(shown, dim=-1)) if cells else None


def packed(kind: str, count: int, *, cells: bool = False) -> PackedSelector:
    """An untrained selector of a kind with ``count`` examples; that of features is as wide as the
    one of examples/okvqa_features.toml."""
    torch.manual_seed(0)
    asked = [catalog.features()[name] for name in ("vote", "agreement")]
    config, features = ModelConfig(selector="static"), None
    if kind == "features":
        names = tuple(f"{feature.name}@{sha256(feature)}" for feature in asked)
        config = ModelConfig(selector="features", pair_features=names, votes=True, hidden=64)
        features = PackedFeatures(tuple(asked), {}, votes=True)
    elif kind != "static":
        config = ModelConfig(selector=kind)
    selector = make_selector(DIM, config, 7 if features else 0).eval().double()
    shown, near = places(count, cells=cells)
    return PackedSelector(
        SelectorPolicy(kind, selector),
        examples(count),
        shown,
        pool_size=POOL,
        features=features,
        cells=near,
    )


def figures(most: int, *, questions: int = 2_000, cells: bool = False) -> Iterator[Figure]:
    """One question (the median) and ``questions`` at once, of every kind and pool."""
    asked = vectors(questions, 2)
    for kind in KINDS:
        for count in (POOL, most):
            selector = packed(kind, count, cells=cells and count > POOL)
            selector.select(asked[0], SHOTS)  # what is computed once
            clock, used = np.empty((2, min(ONE_BY_ONE, questions)))
            for n in range(len(clock)):
                started = time.perf_counter(), time.process_time()
                selector.select(asked[n], SHOTS)
                clock[n] = time.perf_counter() - started[0]
                used[n] = time.process_time() - started[1]
            p99, of_processor = (1000 * np.quantile(taken, 0.99) for taken in (clock, used))
            case = f"{kind}, of {count:,} examples"
            note = f"p99 {p99:.1f} ms, {of_processor:.1f} of processor time"
            goal = "; goal 3 ms" if count == POOL else "; goal 20 ms" if count >= 10**6 else ""
            median = float(np.median(clock))
            yield Figure("pack", case, 1, "questions", median, len(clock), note=note + goal)
            work = [(case, questions, lambda s=selector: s.select(asked, SHOTS))]
            for figure in in_turns("pack", "questions", work, repeats=2):
                yield replace(figure, note="goal 2,000/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--cells", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print_figures(figures(given.examples, cells=given.cells), given.json)


if __name__ == "__main__":
    main()
