"""Predictions scored a second by the official metric, against the rule written out row by row.

    python -m benchmarks.metric [--rows 200000] [--json FILE]

Predictions repeat as those of a model do (a few thousand distinct answers).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Figure, against, in_turns, print_figures
from lever_data.items.vqa_metric import normalize_answer, vqa_accuracy


def plain(predictions: list[str], answers: list[list[str]]) -> list[float]:
    """Each annotator left out in turn, as the formula says."""
    found = []
    for prediction, given in zip(predictions, answers, strict=True):
        said = normalize_answer(prediction)
        known = [normalize_answer(a) for a in given]
        shares = [
            min(1.0, sum(a == said for j, a in enumerate(known) if j != i) / 3)
            for i in range(len(known))
        ]
        found.append(round(100 * sum(shares) / len(shares), 2) / 100)
    return found


def figures(rows: int) -> list[Figure]:
    """Predictions scored: ``rows``, a tenth of them, and some row by row."""
    roll = random.Random(0)
    words = [f"the {n} red cars, number {n % 97}" for n in range(3_000)]
    questions = [roll.choices(words, k=3) for _ in range(9_000)]
    answers = [roll.choices(q, k=10) for q in (roll.choice(questions) for _ in range(rows))]
    predictions = [roll.choice([*a[:3], roll.choice(words)]) for a in answers]

    def score(count: int, by: Callable[[list[str], list[list[str]]], Any]) -> Any:
        return by(predictions[:count], answers[:count])

    few, tenth = rows // 20, rows // 10
    assert np.allclose(score(few, vqa_accuracy), score(few, plain))
    small, ours, theirs = in_turns(
        "metric",
        "predictions",
        [
            ("lever", tenth, lambda: score(tenth, vqa_accuracy)),
            ("lever", rows, lambda: score(rows, vqa_accuracy)),
            ("row by row", few, lambda: score(few, plain)),
        ],
    )
    return [small, *against(replace(ours, note="goal 100,000/s"), [theirs])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print_figures(figures(options.rows), options.json)


if __name__ == "__main__":
    main()
