"""Propose candidates: beam search, temperature samples, random and retrieved pointers.

In go a policy, queries with their pools and a :class:`Recipe`; out come :class:`Proposals`, flat
arrays of ordered pointers with their log-probabilities. Everything is batched over queries, yet a
query's proposals depend on (seed, query id, its pool and embeddings) alone.

Samples are drawn step by step from softmax(score / τ) over what is not chosen yet, by the Gumbel
arg max; so a sequence never repeats a demonstration. Different draws are independent; where two
agree, the later one is dropped as a duplicate. The i-th retrieved candidate is the window of S
neighbours that starts at rank i of the cosine similarity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lever_data.errors import LeverError
from lever_train.options.rollout import Recipe
from lever_train.rollout import search
from lever_train.rollout.policy import Policy
from lever_train.selector.pool import Pool

METHODS = ("beam", "sample", "random", "retrieval")  # of duplicates the earlier is kept
PROPOSAL_VERSION = 1  # part of a job's key: a change of any draw or rule below raises it
_BLOCK_CELLS = 1 << 22  # float64 cells of the largest intermediate: 32 MB


@dataclass(frozen=True)
class Ask:
    """Queries to propose for.

    ``query_ids`` [B] int64; ``query`` [B, d] float; ``table`` [n, d] float, a row per example id;
    ``pool`` [B, K] int64 example ids (-1 where padded) or [K], shared; ``own`` whether examples
    and queries are the same items, so that a query must not be shown itself.
    """

    query_ids: npt.NDArray[np.int64]
    query: Tensor
    table: Tensor
    pool: npt.NDArray[np.int64]
    own: bool


@dataclass(frozen=True)
class Proposals:
    """M candidates, by query and within it by source, best or first draw first.

    ``row`` [M] index into the queries asked; ``positions`` and ``pointer`` [M, S] int64, places in
    the pool and example ids, -1 after the end of a shorter pointer; ``method`` [M] index into
    :data:`METHODS`; ``rank`` [M] of a beam, else -1; ``score`` [M] sum of a beam's step
    probabilities; ``log_prob`` [M] at temperature 1; ``temperature`` [M] of a sample;
    ``log_prob_at`` [M] at that temperature, of a beam at 1. Nats; NaN where there is none.
    """

    row: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    pointer: npt.NDArray[np.int64]
    method: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]
    log_prob: npt.NDArray[np.float64]
    log_prob_at: npt.NDArray[np.float64]
    temperature: npt.NDArray[np.float64]

    def select(self, keep: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Proposals:
        """The proposals at a mask or index."""
        return Proposals(**{name: values[keep] for name, values in vars(self).items()})


@torch.no_grad()
def propose(policy: Policy, ask: Ask, recipe: Recipe) -> Proposals:
    """Propose for every query, duplicates (by ordered pointer) dropped.

    Raises:
        LeverError: a pool holds fewer than ``shot_num`` demonstrations; it names the query.
    """
    K, width = ask.pool.shape[-1], max(recipe.per_query, recipe.beam_width, 1)
    size = max(1, _BLOCK_CELLS // (K * width))
    starts = range(0, len(ask.query_ids), size)
    blocks = [_block(policy, ask, recipe, slice(s, s + size)) for s in starts]
    names = Proposals.__dataclass_fields__
    return Proposals(**{n: np.concatenate([vars(b)[n] for b in blocks]) for n in names})


def _block(policy: Policy, ask: Ask, recipe: Recipe, part: slice) -> Proposals:
    ids, query = ask.query_ids[part], ask.query[part].double()
    shown = ask.pool[part] if ask.pool.ndim == 2 else ask.pool
    pool, closed = _open_pool(ask, ids, shown, recipe.shot_num)
    history = policy.begin(query, pool)
    plan = _Plan.of(recipe)
    parts = [
        search.beams(history, closed, recipe),
        *(search.samples(history, closed, recipe, ids, tau) for tau in recipe.temps),
        search.random(closed, recipe, ids),
        search.retrieval(query, pool, closed, recipe),
    ]
    positions = torch.cat(parts, dim=1)
    terms = search.replay(history, closed, positions, plan.temperature)
    return _flatten(positions, terms, plan, shown, part.start)


@dataclass(frozen=True)
class _Plan:
    """The N columns of a block: their source, beam rank and temperature."""

    method: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    temperature: npt.NDArray[np.float64]

    @classmethod
    def of(cls, recipe: Recipe) -> _Plan:
        beams = recipe.beam_width
        sampled = np.repeat(np.array(recipe.temps, np.float64), recipe.num_samples_per_temp)
        counts = [beams, len(sampled), recipe.num_random, recipe.num_retrieval]
        method = np.repeat(np.arange(4), counts)
        rank = np.where(method == 0, np.arange(len(method)), -1)
        nothing = np.full(counts[2] + counts[3], np.nan)
        return cls(method, rank, np.concatenate([np.full(beams, np.nan), sampled, nothing]))


def _open_pool(
    ask: Ask, ids: npt.NDArray[np.int64], shown: npt.NDArray[np.int64], shots: int
) -> tuple[Pool, Tensor]:
    """The pool of a block in float64, and [B, K] bool: positions that must not be picked."""
    shut = np.broadcast_to(shown < 0, (len(ids), shown.shape[-1])).copy()
    if ask.own:
        shut = shut | (shown == ids[:, None])
    room = (~shut).sum(1)
    if (room < shots).any():
        at = int(np.flatnonzero(room < shots)[0])
        raise LeverError(
            f"{shots} demonstrations cannot be picked from this query's pool",
            where=f"query {ids[at]}",
            value=int(room[at]),
            hint="lower --shot-num, or give a larger --pool",
        )
    closed = torch.from_numpy(shut).to(ask.table.device)
    if shown.ndim == 1:
        rows = torch.from_numpy(shown).to(ask.table.device)
        return Pool(ask.table[rows].double(), None, ~closed if shut.any() else None), closed
    wanted = torch.from_numpy(np.where(shut, -1, shown)).to(ask.table.device)
    pool = Pool.distinct(ask.table, wanted)
    return Pool(pool.vectors.double(), pool.index, pool.mask), closed


def _flatten(
    positions: Tensor, terms: search.Terms, plan: _Plan, shown: npt.NDArray[np.int64], first: int
) -> Proposals:
    """Drop what does not exist and the later of equal pointers; one row a candidate."""
    places = positions.cpu().numpy()
    row, column = np.nonzero(_fresh(places))
    kept = places[row, column]
    pointer = np.take_along_axis(shown[row], kept, 1) if shown.ndim == 2 else shown[kept]
    values = (terms.score, terms.log_prob, terms.log_prob_at)
    score, log_prob, log_prob_at = (v.cpu().numpy()[row, column] for v in values)
    method = plan.method[column]
    return Proposals(
        row=row + first,
        positions=kept,
        pointer=pointer,
        method=method,
        rank=plan.rank[column],
        score=np.where(method == 0, score, np.nan),
        log_prob=log_prob,
        log_prob_at=np.where(method <= 1, log_prob_at, np.nan),
        temperature=plan.temperature[column],
    )


def _fresh(places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """[B, N] bool: the sequence exists and equals no earlier one of its query."""
    exists = np.asarray((places >= 0).all(-1))
    equal = (places[:, :, None, :] == places[:, None, :, :]).all(-1)
    earlier = np.tril(np.ones(equal.shape[1:], dtype=bool), -1)
    repeated = np.asarray((equal & earlier).any(-1))
    fresh: npt.NDArray[np.bool_] = np.logical_and(exists, ~repeated)
    return fresh
