"""The embedded answerer: a mixture of the answers of the demonstrations shown. No weights.

In go prompts whose items have rows in the embeddings; out come answers and exact probabilities.
The distribution of a demonstration is the share of its annotators per answer string; the mixture
weighs them with softmax(similarity / 0.05), similarity being the dot product of the stored float32
vectors. The answer is the one with the largest sum, rounded to six decimals; ties go to the later
in string order. Without demonstrations the answer is the most frequent answer of the examples,
with the distribution of all their answers.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lever_data.errors import LeverError
from lever_data.items.prompts import Item, Prompt
from lever_train.rollout.answerers.base import Answer, Usage

TEMPERATURE = 0.05
DECIMALS = 6  # sums are compared after rounding to this
_VERSION = 1

Vectors = npt.NDArray[np.float32]
Shares = dict[str, float]


class NearestAnswerer:
    """Answers from the demonstrations it is shown.

    Args:
        query_vectors: [n, d] float32, row = example id of a query.
        example_vectors: [m, d] float32, row = example id of a demonstration.
        prior: the answers of the examples, one tuple an example: what is answered without
            demonstrations.
    """

    name = "nearest"
    batch_size = 8192
    template = None

    def __init__(
        self,
        query_vectors: Vectors,
        example_vectors: Vectors,
        prior: Iterable[tuple[str, ...]] = (),
    ) -> None:
        if query_vectors.shape[1] != example_vectors.shape[1]:
            raise LeverError(
                "query and candidate embeddings differ in width",
                value=f"{query_vectors.shape[1]} and {example_vectors.shape[1]}",
            )
        self.usage = Usage()
        self._queries = query_vectors
        self._examples = example_vectors
        self._prior = _shares([a for answers in prior for a in answers])
        self._known: dict[int, tuple[Item, Shares]] = {}

    def generation(self) -> dict[str, Any]:
        """The rule's version and temperature, and a digest of the prior."""
        prior = hashlib.sha256(repr(sorted(self._prior.items())).encode()).hexdigest()[:16]
        return {"rule": _VERSION, "temperature": TEMPERATURE, "prior": prior}

    def provenance(self) -> dict[str, Any]:
        """Nothing beside its rule."""
        return {}

    def fingerprint(self, item: Item) -> bytes:
        """Digest of both vectors an item may have and of the answers it would show."""
        digest = hashlib.sha256(repr(item.answers).encode())
        for table in (self._queries, self._examples):
            if 0 <= item.example_id < len(table):
                digest.update(table[item.example_id].tobytes())
        return digest.digest()

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer prompts; the similarities of all of them in one product.

        Raises:
            LeverError: an item has no row in the embeddings.
        """
        weights = iter(self._weights(prompts))
        self.usage.answers += len(prompts)
        return [self._one(p, [next(weights) for _ in p.demonstrations]) for p in prompts]

    def _one(self, prompt: Prompt, weights: list[float]) -> Answer:
        mixture = self._mix(prompt.demonstrations, weights) if weights else self._prior
        if not mixture:
            return Answer(None, error="no demonstration has an answer, and there is no prior")
        text = max((round(share, DECIMALS), answer) for answer, share in mixture.items())[1]
        return Answer(text, tuple(_log(mixture.get(a, 0.0)) for a in prompt.given))

    def _mix(self, demonstrations: Sequence[Item], weights: list[float]) -> Shares:
        top = max(weights)
        raised = [math.exp(w - top) for w in weights]
        total = sum(raised)
        mixture: Shares = {}
        for item, weight in zip(demonstrations, raised, strict=True):
            for answer, share in self._shares(item).items():
                mixture[answer] = mixture.get(answer, 0.0) + weight / total * share
        return mixture

    def _weights(self, prompts: Sequence[Prompt]) -> list[float]:
        """similarity / 0.05 of every demonstration of every prompt, in order."""
        pairs = [(p.query.example_id, d.example_id) for p in prompts for d in p.demonstrations]
        if not pairs:
            return []
        rows = np.array(pairs, dtype=np.int64)
        for column, table in ((0, self._queries), (1, self._examples)):
            if rows[:, column].max() >= len(table):
                raise LeverError(
                    "an item has no row in the embeddings",
                    where=("query", "example")[column],
                    value=int(rows[:, column].max()),
                    hint=f"the embeddings have {len(table):,} rows; row = item index",
                )
        left, right = self._queries[rows[:, 0]], self._examples[rows[:, 1]]
        # float64 sums rounded once: the same bits whatever the batch
        dots = np.einsum("nd,nd->n", left, right, dtype=np.float64).astype(np.float32)
        scaled: list[float] = (dots.astype(np.float64) / TEMPERATURE).tolist()
        return scaled

    def _shares(self, item: Item) -> Shares:
        found = self._known.get(id(item))
        if found is None or found[0] is not item:
            found = (item, _shares(item.answers))
            self._known[id(item)] = found
        return found[1]


def _shares(answers: Sequence[str]) -> Shares:
    counts: Mapping[str, int] = Counter(answers)
    return {answer: count / len(answers) for answer, count in counts.items()}


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
