"""Uncertainty of means: bootstrap intervals clustered by query, paired tests.

In go NumPy arrays of scores; out come plain floats. Pure functions of the arguments: the same
seed gives the same interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]

REPLICATES = 2000
LUCK_REPLICATES = 1000
_CELLS_AT_ONCE = 20_000_000  # counts drawn in one go: 160 MB


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """How two yes/no outcomes of the same queries differ.

    Attributes:
        only_a: queries where only A succeeds.
        only_b: queries where only B succeeds.
        p: two-sided exact p of "both succeed equally often"; 1 where the outcomes never differ.
    """

    only_a: int
    only_b: int
    p: float


def bootstrap_mean(
    values: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` with a percentile interval that resamples whole clusters.

    Candidates of one query share the query's difficulty; drawing queries instead of candidates
    keeps the interval from being too narrow (Davison & Hinkley 1997, section 3.8). Clusters with
    the same sum and size are drawn together as one multinomial cell, which is the same
    distribution and fast for scores of few values.

    Args:
        values: float [N].
        clusters: int [N], the query of each value; ``None``: every value is its own cluster.
        replicates: bootstrap samples.
        confidence: the interval covers this share of the replicates.
        seed: of the random numbers.

    Raises:
        ValueError: no values, or the lengths differ.
    """
    values = np.asarray(values, np.float64)
    if clusters is None:
        index = np.arange(len(values))
    else:
        if len(clusters) != len(values):
            raise ValueError(f"{len(values)} values cannot have {len(clusters)} clusters")
        _, index = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    return bootstrap_ratio(sums, sizes, replicates=replicates, confidence=confidence, seed=seed)


def bootstrap_ratio(
    sums: np.ndarray,
    sizes: np.ndarray,
    *,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """:func:`bootstrap_mean` of clusters already summed up.

    Args:
        sums: float [C], sum of the values of each cluster.
        sizes: int [C], their number.
        replicates, confidence, seed: as there.
    """
    if not len(sums):
        raise ValueError("the mean of no values")
    mean = float(np.sum(sums) / np.sum(sizes))
    sums, sizes, counts = _cells(sums, sizes)
    shares = counts / counts.sum()
    rng = np.random.default_rng(seed)
    means = np.empty(replicates)
    step = max(1, _CELLS_AT_ONCE // len(counts))
    for first in range(0, replicates, step):
        size = min(step, replicates - first)
        drawn = rng.multinomial(int(counts.sum()), shares, size=size)
        means[first : first + size] = (drawn @ sums) / (drawn @ sizes)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def sign_flip_p(differences: np.ndarray, *, replicates: int = 9_999, seed: int = 0) -> float:
    """Two-sided p of "the paired differences have mean 0" by a randomisation test.

    Under it the sign of each difference is a toss of a fair coin; p is the share of tosses whose
    sum is at least as far from 0 as what was seen (Fisher 1935; the "+ 1" of Phipson & Smyth 2010
    keeps it above 0). Differences of equal size are tossed together as one binomial.

    Args:
        differences: float [N], A minus B, one per query.
        replicates: tosses of all signs.
        seed: of the random numbers.
    """
    sizes, counts = np.unique(np.round(np.abs(differences), 12), return_counts=True)
    seen = abs(float(np.sum(differences)))
    rng = np.random.default_rng(seed)
    heads = rng.binomial(counts, 0.5, size=(replicates, len(counts)))
    sums = np.abs((2 * heads - counts) @ sizes)
    # half of the last rounded digit: a sum that is equal on paper counts as equal
    return float((1 + np.sum(sums >= seen - 1e-9)) / (1 + replicates))


def mcnemar(a: np.ndarray, b: np.ndarray) -> McNemar:
    """McNemar's exact test on paired outcomes.

    The queries where A and B differ are tosses of a fair coin if both are equally good; p is the
    two-sided binomial probability of a split at least this uneven (McNemar 1947, exact form).

    Args:
        a: bool [N], whether A's pick is right, one per query.
        b: bool [N], the same queries in the same order.

    Raises:
        ValueError: the lengths differ.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape:
        raise ValueError(f"outcomes of {len(a)} and of {len(b)} queries cannot be paired")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(only_a, only_b, _two_sided_binomial(min(only_a, only_b), only_a + only_b))


def chance_lead(scores: np.ndarray) -> float:
    """Mean lead of the best cell over the mean cell, were all equally good; bootstrap over queries.

    Args:
        scores: [n, cells] accuracies; each cell's mean is taken out first.
    """
    level = scores - scores.mean(0)
    n = len(level)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=LUCK_REPLICATES) / n
    means = weights @ level
    return float((means.max(1) - means.mean(1)).mean())


def effective_sample_size(log_weights: np.ndarray) -> float:
    """(Σw)² / Σw² of weights given as logarithms (Kong 1992); 0 for none, at most their number."""
    log_weights = np.asarray(log_weights, np.float64)
    if not len(log_weights):
        return 0.0
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


def _cells(sums: np.ndarray, sizes: np.ndarray) -> tuple[FloatArray, FloatArray, np.ndarray]:
    """Distinct (sum, size) of the clusters and how many clusters have each."""
    rounded = np.round(np.asarray(sums, np.float64), 12)  # one cell for equal scores
    pairs = np.column_stack([rounded, np.asarray(sizes, np.float64)])
    cells, counts = np.unique(pairs, axis=0, return_counts=True)
    return cells[:, 0], cells[:, 1], counts


def _two_sided_binomial(fewer: int, tosses: int) -> float:
    """min(1, 2 · P(X ≤ fewer)) for X ~ Binomial(tosses, 1/2), summed in logarithms."""
    if not tosses:
        return 1.0
    k = np.arange(1, fewer + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((tosses - k + 1) / k))])
    top = float(logs.max())
    log_sum = top + float(np.log(np.exp(logs - top).sum())) - tosses * float(np.log(2))
    return min(1.0, 2 * float(np.exp(log_sum)))
