"""The answerer of the embedded world: it answers from the demonstrations it is shown.

In go demonstrations per query; out come answers and what the answerer holds each answer to be
worth. The rule is that of the `nearest` answerer: the demonstrations' answer distributions (share
of the annotators per answer), mixed with weights softmax(similarity / 0.05); the answer with the
largest sum wins (rounded to 6 decimals; ties go to the later one in string order). It knows
nothing about the query but how much it resembles the demonstrations.
"""

from __future__ import annotations

import numpy as np

from lever_demo.world import Floats, Items

SHARPNESS = 0.05  # temperature of the weights
DECIMALS = 6


class DemoAnswerer:
    """Answers queries from demonstrations among ``examples``."""

    def __init__(self, examples: Items) -> None:
        self.vision: Floats = examples.vision
        self.words = sorted({answer for said in examples.answers for answer in said})
        self.shares = np.stack([counts(said, self.words) / len(said) for said in examples.answers])

    def distribution(self, vision: Floats, shown: np.ndarray) -> np.ndarray:
        """What the answerer holds likely: float64 [n, N, V], each row a distribution over words.

        Args:
            vision: [n, d], the queries as the answerer sees them.
            shown: [n, N, S] int, N sequences of S demonstrations for each query.
        """
        seen = self.vision[shown].astype(np.float64)
        similarity = np.einsum("nd,nksd->nks", vision.astype(np.float64), seen)
        weights = np.exp((similarity - similarity.max(-1, keepdims=True)) / SHARPNESS)
        weights /= weights.sum(-1, keepdims=True)
        mixed: np.ndarray = np.einsum("nks,nksv->nkv", weights, self.shares[shown])
        return mixed

    def choose(self, distribution: np.ndarray) -> np.ndarray:
        """The answers [n, N] that win under ``distribution`` [n, N, V]."""
        last_first = np.round(distribution, DECIMALS)[..., ::-1]
        winner = distribution.shape[-1] - 1 - last_first.argmax(-1)
        words: np.ndarray = np.array(self.words, dtype=object)[winner]
        return words

    def answer(self, vision: Floats, shown: np.ndarray) -> np.ndarray:
        """Answers, strings [n, N], to queries shown ``shown`` [n, N, S]."""
        return self.choose(self.distribution(vision, shown))


def counts(said: list[str], words: list[str]) -> np.ndarray:
    """How many annotators gave each of ``words``, float64 [V]."""
    found: np.ndarray = np.array([said.count(word) for word in words], dtype=np.float64)
    return found
