"""What a selector has to beat: random, nearest-neighbour, the pool's vote and its best.

In go the held-out queries (an ``Ask`` with their pools); out come ordered pointers [n, S] of
example ids. Picks at fewer shots are the first of the picks at more: a selector trained on two
shots goes on with its own ranking.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lever_data.errors import LeverError
from lever_train.inputs.pair_features import Pairs, votes
from lever_train.options.rollout import Recipe
from lever_train.rollout.policy import Policy, Similarity
from lever_train.rollout.propose import Ask, propose

Pointers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
Accuracy = npt.NDArray[np.float64]
Judge = Callable[[Rows, Pointers], Accuracy]


def greedy(policy: Policy, ask: Ask, shots: int) -> Pointers:
    """The most probable demonstration at every step, int64 [n, shots]."""
    recipe = Recipe(shot_num=shots, num_beams=1, temps=(), num_random=0)
    return _only(policy, ask, recipe)


def nearest(ask: Ask, shots: int) -> Pointers:
    """The most similar demonstrations by cosine, most similar first, int64 [n, shots]."""
    return greedy(Similarity(), ask, shots)


def random(ask: Ask, shots: int, seed: int) -> Pointers:
    """Demonstrations drawn uniformly from each pool; depends on (seed, query id) alone."""
    recipe = Recipe(shot_num=shots, num_beams=0, temps=(), num_random=1, seed=seed)
    return _only(Similarity(), ask, recipe)


def vote(pairs: Pairs, ask: Ask, shots: int) -> Pointers:
    """The demonstrations whose answers the pool votes for most, int64 [n, shots].

    Candidates vote for the answers of their annotators, weighed by softmax(cosine / 0.05); the
    answers of the queries are not read. Ties go to the more similar, then to the earlier.

    Raises:
        LeverError: a pool is too small.
    """
    share, cosine = votes(pairs)
    closed = pairs.pool < 0
    if ask.own:
        closed = closed | (pairs.pool == ask.query_ids[:, None])
    share[closed] = -1.0
    order = np.lexsort((-cosine, -share), axis=-1)[:, :shots]
    _require_choice(np.take_along_axis(share, order, 1).min(1), ask, shots)
    return np.take_along_axis(pairs.pool, order, 1)


def oracle(ask: Ask, shots: int, judge: Judge) -> Pointers:
    """The best of the pool, found by asking the answerer about every choice, int64 [n, shots].

    Exact at one shot. Each further demonstration is the one that helps most after those chosen
    already, so the accuracy at two and more is a lower bound of what the pool allows. Ties go to
    the earlier position in the pool. Asks n · K · shots times.

    Args:
        ask: the queries and their pools.
        shots: demonstrations to choose.
        judge: accuracies [m] of ``(rows [m], pointers [m, S])``; NaN where the answerer failed.
    """
    n = len(ask.query_ids)
    shown = np.broadcast_to(ask.pool, (n, ask.pool.shape[-1]))
    closed = shown < 0
    if ask.own:
        closed = closed | (shown == ask.query_ids[:, None])
    chosen = np.zeros((n, 0), dtype=np.int64)
    for _ in range(shots):
        rows, places = np.nonzero(~closed)
        tried = np.column_stack([chosen[rows], shown[rows, places]])
        score = np.full(shown.shape, -1.0)
        score[rows, places] = np.nan_to_num(judge(rows, tried), nan=-0.5)
        best = score.argmax(1)
        _require_choice(score[np.arange(n), best], ask, shots)
        closed[np.arange(n), best] = True
        chosen = np.column_stack([chosen, shown[np.arange(n), best]])
    return chosen


def _only(policy: Policy, ask: Ask, recipe: Recipe) -> Pointers:
    found = propose(policy, ask, recipe)
    if len(found.row) != len(ask.query_ids):
        raise AssertionError(f"{len(found.row)} picks for {len(ask.query_ids)} queries")
    return found.pointer


def _require_choice(best: Accuracy, ask: Ask, shots: int) -> None:
    if (best == -1.0).any():
        query = int(ask.query_ids[np.flatnonzero(best == -1.0)[0]])
        raise LeverError(
            f"{shots} demonstrations cannot be picked from this query's pool",
            where=f"query {query}",
            hint="lower --shots, or give a larger --pool",
        )
