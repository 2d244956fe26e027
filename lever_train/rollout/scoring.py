"""Answers become score columns: the official metric, or string matching that says so.

In go answers with the ground truth of their queries; out come :class:`Score` records. Also here:
the expected accuracy under the answerer's own probabilities.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lever_data.items.items import Truth
from lever_data.items.prompts import postprocess
from lever_data.items.vqa_metric import edit_similarity, fallback_match, token_f1, vqa_accuracy
from lever_train.rollout.answerers.base import Answer

DECIMALS = 6


@dataclass(frozen=True, slots=True)
class Score:
    """The score columns of one answer, named as in the table; all ``None`` where it failed."""

    eval_mode: str | None = None
    error: str | None = None
    prediction: str | None = None
    raw: str | None = None
    correct: int | None = None
    accuracy: float | None = None
    gt_prob: float | None = None
    token_f1: float | None = None
    edit_sim: float | None = None


def score(answers: Sequence[Answer], truths: Sequence[Truth]) -> list[Score]:
    """Score answers, one each, in order."""
    predictions = [postprocess(a.text) if a.text is not None else "" for a in answers]
    # the metric's own cache makes repeated answer lists cheap
    official = vqa_accuracy(predictions, [t.answers for t in truths]).tolist()
    return [
        _one(answer, prediction, truth, accuracy)
        for answer, prediction, truth, accuracy in zip(
            answers, predictions, truths, official, strict=True
        )
    ]


def _one(answer: Answer, prediction: str, truth: Truth, accuracy: float) -> Score:
    if answer.text is None:
        return Score(error=answer.error)
    if not truth.official:
        accuracy = fallback_match(prediction, truth.answers)
    f1, edit = _similar(prediction, truth.given)
    return Score(
        eval_mode="file" if truth.official else "fallback",
        prediction=prediction,
        raw=answer.text,
        correct=int(accuracy > 0),
        accuracy=accuracy,
        gt_prob=expected_accuracy(answer, truth),
        token_f1=f1,
        edit_sim=edit,
    )


def expected_accuracy(answer: Answer, truth: Truth) -> float | None:
    """Σ_a P(a)·min(n_a / 3, 1) over the distinct ground-truth answers a that n_a annotators gave.

    P(a) is the answerer's probability of exactly this string; ``None`` where it gives none.
    """
    if answer.log_probs is None:
        return None
    counts = Counter(truth.answers)
    terms = (
        math.exp(log_prob) * min(counts[said] / 3, 1.0)
        for said, log_prob in zip(truth.given, answer.log_probs, strict=True)
    )
    return round(math.fsum(terms), DECIMALS)


@lru_cache(maxsize=1 << 16)
def _similar(prediction: str, answers: tuple[str, ...]) -> tuple[float, float]:
    f1 = round(token_f1(prediction, answers), DECIMALS)
    return f1, round(edit_similarity(prediction, answers), DECIMALS)
