"""Predictions scored a second by the official metric, against the rule written out row by row.

    python -m benchmarks.metric [--rows 200000] [--json FILE]

Predictions repeat as those of a model do (a few thousand distinct answers).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lever_data.vqa_metric import normalize_answer, vqa_accuracy

REPEATS = 3


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    roll = random.Random(0)
    words = [f"the {n} red cars, number {n % 97}" for n in range(3_000)]
    questions = [roll.choices(words, k=3) for _ in range(9_000)]
    answers = [roll.choices(q, k=10) for q in (roll.choice(questions) for _ in range(options.rows))]
    predictions = [roll.choice([*a[:3], roll.choice(words)]) for a in answers]
    few = options.rows // 20
    assert np.allclose(
        vqa_accuracy(predictions[:few], answers[:few]), plain(predictions[:few], answers[:few])
    )
    ours = _seconds(lambda: vqa_accuracy(predictions, answers)) / options.rows
    theirs = _seconds(lambda: plain(predictions[:few], answers[:few])) / few
    figures = {
        "metric: predictions/s (goal 100,000)": 1 / ours,
        "metric: row by row, predictions/s": 1 / theirs,
        "metric: times": theirs / ours,
    }
    for name, value in figures.items():
        print(f"| {name} | {value:,.1f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def _seconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
