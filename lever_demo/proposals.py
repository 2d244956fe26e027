"""Which demonstrations the embedded world tries for each train query, and what came of it.

In goes a :class:`World`; out come :class:`Proposals`: beams, temperature samples and a random pair
from a policy that knows nothing but the similarity of embeddings, each answered by the world's
answerer and scored by the VQA metric. This is what an engineer has before any training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lever_data.items.vqa_metric import fallback_match, vqa_accuracy
from lever_demo.answers import DemoAnswerer, counts
from lever_demo.world import Items, World

POLICY_TEMPERATURE = 0.1  # cosines are divided by it, as the selector's scores are
BEAMS = 5
TEMPERATURES = (1.0, 1.3)
SAMPLES = 2  # at each temperature
SHOTS = 2
FALLBACK_SHARE = 0.03  # of the candidates, scored by string matching as in real data


@dataclass(frozen=True)
class Draw:
    """One source of candidates, one row a query: pool positions [n, 2] and their probability.

    ``log_prob`` [n] in nats at ``temperature``; ``probability_sum`` [n], the legacy beam score;
    both ``None`` where the source has none.
    """

    method: str
    positions: np.ndarray
    rank: int | None = None
    temperature: float | None = None
    log_prob: np.ndarray | None = None
    probability_sum: np.ndarray | None = None


@dataclass(frozen=True)
class Scores:
    """What came of n × N candidates: strings, accuracies, gt_prob and fallback flags, [n, N]."""

    prediction: np.ndarray
    accuracy: np.ndarray
    gt_prob: np.ndarray
    is_fallback: np.ndarray


def propose(world: World) -> list[Draw]:
    """Candidates of every train query: 5 beams, 2 samples at each temperature, 1 random pair."""
    rng = np.random.default_rng([world.spec.seed, 1])
    seen = world.train.embedding.astype(np.float64)
    logits = np.einsum("nd,nkd->nk", seen, seen[world.train_pool]) / POLICY_TEMPERATURE
    draws = _beams(logits)
    for temperature in TEMPERATURES:
        for _ in range(SAMPLES):
            noise = rng.gumbel(size=logits.shape)  # the top of logits + Gumbel noise is a sample
            positions = np.argsort(-(logits / temperature + noise), axis=1)[:, :SHOTS]
            log_prob, _ = _log_prob(logits / temperature, positions)
            draws.append(Draw("sample", positions, None, temperature, log_prob))
    anything = np.argsort(rng.random(logits.shape), axis=1)[:, :SHOTS]
    draws.append(Draw("random", anything))
    return draws


def score(world: World, draws: list[Draw]) -> Scores:
    """Let the answerer answer every candidate, and score its answers."""
    rng = np.random.default_rng([world.spec.seed, 2])
    positions = np.stack([draw.positions for draw in draws], axis=1)
    shown = np.take_along_axis(world.train_pool[:, None, :], positions, axis=2)
    answerer = DemoAnswerer(world.train)
    likely = answerer.distribution(world.train.vision, shown)
    prediction = answerer.choose(likely)
    fallback = rng.random(prediction.shape) < FALLBACK_SHARE
    return Scores(
        prediction,
        _accuracy(prediction, fallback, world.train.answers),
        _gt_prob(likely, world.train, answerer.words),
        fallback,
    )


def _beams(logits: np.ndarray) -> list[Draw]:
    """The BEAMS most probable ordered pairs, by looking at all of them."""
    n, K = logits.shape
    first = np.repeat(np.arange(K), K)
    second = np.tile(np.arange(K), K)
    pairs = np.broadcast_to(np.stack([first, second], axis=1), (n, K * K, SHOTS))
    log_prob, probability = _log_prob(logits[:, None, :], pairs)
    log_prob = np.where(first == second, -np.inf, log_prob)
    best = np.argsort(-np.round(log_prob, 9), axis=1, kind="stable")[:, :BEAMS]
    return [
        Draw(
            "beam",
            pairs[0, best[:, rank]],
            rank,
            None,
            np.take_along_axis(log_prob, best[:, rank : rank + 1], axis=1)[:, 0],
            np.take_along_axis(probability, best[:, rank : rank + 1], axis=1)[:, 0],
        )
        for rank in range(BEAMS)
    ]


def _log_prob(logits: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of drawing two positions [..., 2] in order, and the sum of both steps'
    probabilities; ``logits`` [..., K] broadcasts over the positions."""
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability = probability / probability.sum(-1, keepdims=True)
    probability = np.broadcast_to(probability, (*positions.shape[:-1], logits.shape[-1]))
    chosen = np.take_along_axis(probability, positions, axis=-1)
    first = chosen[..., 0]
    second = chosen[..., 1] / (1.0 - first)
    return np.log(first) + np.log(second), first + second


def _accuracy(prediction: np.ndarray, fallback: np.ndarray, answers: list[list[str]]) -> np.ndarray:
    """Accuracy [n, N]: official, but by string matching where ``fallback`` says so."""
    columns = [vqa_accuracy(list(column), answers) for column in prediction.T]
    accuracy: np.ndarray = np.stack(columns, axis=1)
    for query, candidate in np.argwhere(fallback):
        found = fallback_match(prediction[query, candidate], answers[query])
        accuracy[query, candidate] = found
    return accuracy


def _gt_prob(likely: np.ndarray, items: Items, words: list[str]) -> np.ndarray:
    """Expected accuracy Σ_a P(a) · min(n_a / 3, 1) under the answerer's distribution, [n, N]."""
    worth = np.stack([np.minimum(counts(said, words) / 3, 1) for said in items.answers])
    expected: np.ndarray = np.einsum("nkv,nv->nk", likely, worth)
    return expected
