"""Propose candidates: beam search, temperature samples, random and retrieved pointers.

In go a policy, queries with their pools and a :class:`Recipe`; out come :class:`Proposals`, flat
arrays of ordered pointers with their log-probabilities. Everything is batched over queries, yet a
query's proposals depend on (seed, query id, its pool and embeddings) alone: every random number is
a function of (seed, query id, stream, index), so how queries are batched, ordered or spread over
workers cannot change a draw.

Samples are drawn step by step from softmax(score / τ) over what is not chosen yet, by the Gumbel
arg max; so a sequence never repeats a demonstration. Different draws are independent; where two
agree, the later one is dropped as a duplicate. The i-th retrieved candidate is the window of S
neighbours that starts at rank i of the cosine similarity.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from lever_data.errors import LeverError
from lever_train.options.rollout import Recipe
from lever_train.rollout.policy import Policy, Similarity
from lever_train.selector.model import History, Pool

if TYPE_CHECKING:
    from lever_train.inputs.pair_features import PairFeatures

METHODS = ("beam", "sample", "random", "retrieval", "empty")  # of duplicates the earlier is kept
PROPOSAL_VERSION = 1  # part of a job's key: a change of any draw or rule below raises it
_BLOCK_CELLS = 1 << 22  # float64 cells of the largest intermediate: 32 MB


@dataclass(frozen=True)
class Ask:
    """Queries to propose for.

    ``query_ids`` [B] int64; ``query`` [B, d] float; ``table`` [n, d] float, a row per example id;
    ``pool`` [B, K] int64 example ids (-1 where padded) or [K], shared; ``own`` whether examples
    and queries are the same items, so that a query must not be shown itself; ``features``
    what the policy reads of pairs.
    """

    query_ids: npt.NDArray[np.int64]
    query: Tensor
    table: Tensor
    pool: npt.NDArray[np.int64]
    own: bool
    features: PairFeatures | None = None


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


def unpadded(pointers: npt.NDArray[np.int64]) -> list[tuple[int, ...]]:
    """Pointers [M, S] without what pads the shorter ones."""
    return [tuple(e for e in row if e >= 0) for row in pointers.tolist()]


@torch.no_grad()
def propose(policy: Policy, ask: Ask, recipe: Recipe) -> Proposals:
    """Propose for every query, duplicates (by ordered pointer) dropped.

    Raises:
        LeverError: a pool holds fewer than ``shot_num`` demonstrations; it names the query.
    """
    K, width = ask.pool.shape[-1], max(recipe.per_query, recipe.beam_width, 1)
    if ask.features is not None:  # its values, the votes among them, are made a block at a time
        width = max(width, K + ask.features.values.shape[-1])
    size = max(1, _BLOCK_CELLS // (K * width))
    starts = range(0, len(ask.query_ids), size)
    blocks = [_block(policy, ask, recipe, slice(s, s + size)) for s in starts]
    names = Proposals.__dataclass_fields__
    return Proposals(**{n: np.concatenate([vars(b)[n] for b in blocks]) for n in names})


def _block(policy: Policy, ask: Ask, recipe: Recipe, part: slice) -> Proposals:
    ids, query = ask.query_ids[part], ask.query[part].double()
    shown = ask.pool[part] if ask.pool.ndim == 2 else ask.pool
    pool, closed = _open_pool(ask, ids, shown, recipe.shot_num)
    if ask.features is not None:
        given = torch.from_numpy(ask.features.of(ids, shown.shape[-1])).to(ask.table.device)
        pool = replace(pool, features=given.double())
    history = policy.begin(query, pool)
    plan = _Plan.of(recipe)
    # a policy that can stop has one more position, behind the pool: to end the pointer there
    opened = pad(closed, (0, 1), value=False) if history.stops else closed
    parts = [
        beams(history, opened, recipe),
        *(samples(history, opened, recipe, ids, tau) for tau in recipe.temps),
        random(closed, recipe, ids),
        retrieval(query, pool, closed, recipe),
    ]
    positions = torch.cat(parts, dim=1)
    terms = replay(history, opened, positions, plan.temperature)
    found = _flatten(positions, terms, plan, shown, part.start)
    return _with_empty(found, len(ids), part.start) if recipe.zero_shot else found


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
            hint="show fewer (--shots; --shot-num elsewhere), or give a larger --pool",
        )
    closed = torch.from_numpy(shut).to(ask.table.device)
    if shown.ndim == 1:
        rows = torch.from_numpy(shown).to(ask.table.device)
        return Pool(ask.table[rows].double(), None, ~closed if shut.any() else None), closed
    wanted = torch.from_numpy(np.where(shut, -1, shown)).to(ask.table.device)
    pool = Pool.distinct(ask.table, wanted)
    return Pool(pool.vectors.double(), pool.index, pool.mask), closed


def _flatten(
    positions: Tensor, terms: Terms, plan: _Plan, shown: npt.NDArray[np.int64], first: int
) -> Proposals:
    """Drop what does not exist and the later of equal pointers; one row a candidate."""
    places = positions.cpu().numpy()
    row, column = np.nonzero(_fresh(places))
    kept = places[row, column]
    kept[kept == shown.shape[-1]] = -1  # the end of a pointer
    pointer = np.take_along_axis(shown[row], kept, 1) if shown.ndim == 2 else shown[kept]
    pointer[kept < 0] = -1
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


def _with_empty(found: Proposals, count: int, first: int) -> Proposals:
    """The same with an empty pointer behind the candidates of each of ``count`` queries that has
    none yet, as a policy that can stop may have proposed it."""
    ends = (found.positions < 0).all(1)
    row = np.setdiff1d(np.arange(first, first + count), found.row[ends])
    nothing = np.full((len(row), found.positions.shape[1]), -1)
    unknown = np.full(len(row), np.nan)
    method = np.full(len(row), METHODS.index("empty"))
    rank = np.full(len(row), -1)
    empty = Proposals(row, nothing, nothing, method, rank, *[unknown] * 4)
    both = {n: np.concatenate([a, vars(empty)[n]]) for n, a in vars(found).items()}
    return Proposals(**both).select(np.argsort(both["row"], kind="stable"))


def _fresh(places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """[B, N] bool: the sequence exists and equals no earlier one of its query."""
    exists = np.asarray((places >= 0).all(-1))
    equal = (places[:, :, None, :] == places[:, None, :, :]).all(-1)
    earlier = np.tril(np.ones(equal.shape[1:], dtype=bool), -1)
    repeated = np.asarray((equal & earlier).any(-1))
    fresh: npt.NDArray[np.bool_] = np.logical_and(exists, ~repeated)
    return fresh


DECIMALS = 6  # what is stored; float64 sums differ in the last bits from batch to batch


def beams(start: History, closed: Tensor, recipe: Recipe) -> Tensor:
    """The best sequences by log-probability [B, W, S], best first; -1 where there are no more.

    Among equals the earlier sequence and the lower position win.
    """
    B, K = closed.shape
    width = recipe.beam_width
    positions = closed.new_zeros((B, 1, 0), dtype=torch.long)
    if not width:
        return closed.new_zeros((B, 0, recipe.shot_num), dtype=torch.long)
    total = torch.zeros((B, 1), dtype=torch.float64, device=closed.device)
    taken, history = closed[:, None, :], start
    for shot in range(1, recipe.shot_num + 1):
        step = history.scores().masked_fill(taken, float("-inf")).log_softmax(-1)
        total = (total[..., None] + step.nan_to_num(nan=float("-inf"))).flatten(1)
        is_wide = shot == recipe.shot_num or not recipe.last_alone
        total, best = _largest(total.round(decimals=9), width if is_wide else 1)
        parent, chosen = best // K, best % K
        positions = _grow(positions, parent, chosen)
        taken = _take(taken.gather(1, parent[..., None].expand(-1, -1, K)), chosen, start.stops)
        history = history.advance(parent, chosen)
    positions = positions.masked_fill(torch.isinf(total)[..., None], -1)
    missing = width - positions.shape[1]
    return pad(positions, (0, 0, 0, missing), value=-1)


def _largest(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of each row, ties by the lower index: values and indices."""
    ordered = values.sort(dim=-1, descending=True, stable=True)
    return ordered.values[:, :width], ordered.indices[:, :width]


def _grow(positions: Tensor, parent: Tensor, chosen: Tensor) -> Tensor:
    before = positions.gather(1, parent[..., None].expand(-1, -1, positions.shape[-1]))
    return torch.cat([before, chosen[..., None]], dim=-1)


def _take(taken: Tensor, chosen: Tensor, stops: bool) -> Tensor:
    """Positions [B, W, K] that are closed after ``chosen`` [B, W]; behind an end only the end is
    open, so that a pointer that ended stays what it is, with log-probability 0 per further step."""
    taken = taken.scatter(2, chosen[..., None], True)
    if stops:
        end = taken.shape[-1] - 1
        taken = taken | (chosen == end)[..., None]
        taken[..., end] = False
    return taken


def samples(
    start: History, closed: Tensor, recipe: Recipe, ids: npt.NDArray[np.int64], tau: float
) -> Tensor:
    """Draws [B, W, S] at temperature ``tau``."""
    B, K = closed.shape
    W = recipe.num_samples_per_temp
    taken = closed[:, None, :].expand(B, W, K)
    parent = torch.zeros((B, W), dtype=torch.long, device=closed.device)
    history, chosen = start, []
    for t in range(recipe.shot_num):
        noise = (
            np.stack([_noise(recipe, ids, f"sample/{tau!r}/{w}/{t}", K) for w in range(W)], axis=1)
            if W
            else np.zeros((B, 0, K))
        )
        scores = history.scores() / tau + torch.from_numpy(noise).to(closed.device)
        pick = scores.masked_fill(taken, float("-inf")).argmax(-1)
        chosen.append(pick)
        taken = _take(taken, pick, start.stops)
        if t + 1 < recipe.shot_num:
            history = history.advance(parent, pick)
            parent = torch.arange(W, device=closed.device).expand(B, W)
    return torch.stack(chosen, dim=-1)


def random(closed: Tensor, recipe: Recipe, ids: npt.NDArray[np.int64]) -> Tensor:
    """Uniform draws [B, W, S] of distinct positions: the S largest of equal-weight Gumbels."""
    B, K = closed.shape
    found = [closed.new_zeros((B, 0, recipe.shot_num), dtype=torch.long)]
    for w in range(recipe.num_random):
        noise = torch.from_numpy(_noise(recipe, ids, f"random/{w}", K)).to(closed.device)
        best = noise.masked_fill(closed, float("-inf")).topk(recipe.shot_num).indices
        found.append(best[:, None, :])
    return torch.cat(found, dim=1)


def retrieval(query: Tensor, pool: Pool, closed: Tensor, recipe: Recipe) -> Tensor:
    """Windows [B, W, S] of the ranking by cosine similarity; -1 where the pool ends."""
    count, shots = recipe.num_retrieval, recipe.shot_num
    if not count:
        return closed.new_zeros((len(closed), 0, shots), dtype=torch.long)
    first = recipe.round * count
    scores = Similarity().begin(query, pool).scores()[:, 0].masked_fill(closed, float("-inf"))
    values, order = _largest(scores, first + count + shots - 1)
    order = order.masked_fill(torch.isinf(values), -1)
    order = pad(order, (0, first + count + shots - 1 - order.shape[1]), value=-1)
    windows = order[:, first:].unfold(1, shots, 1)
    return windows.masked_fill((windows < 0).any(-1, keepdim=True), -1)


def _noise(
    recipe: Recipe, ids: npt.NDArray[np.int64], stream: str, count: int
) -> npt.NDArray[np.float64]:
    return gumbel(draw_keys(recipe.seed, ids, f"{stream}/{recipe.round}"), count)


@dataclass(frozen=True)
class Terms:
    """Per candidate [B, N] float64: sums over the steps."""

    score: Tensor
    log_prob: Tensor
    log_prob_at: Tensor


def replay(
    start: History, closed: Tensor, positions: Tensor, temperature: npt.NDArray[np.float64]
) -> Terms:
    """What the policy says of the sequences at ``positions`` [B, N, S], step by step."""
    B, N, S = positions.shape
    at = torch.from_numpy(np.nan_to_num(temperature, nan=1.0)).to(closed.device)[:, None]
    real = positions.clamp(min=0)
    taken = closed[:, None, :].expand(B, N, -1)
    parent = torch.zeros((B, N), dtype=torch.long, device=closed.device)
    history = start
    ended = torch.zeros((B, N), dtype=torch.bool, device=closed.device)
    sums = [torch.zeros((B, N), dtype=torch.float64, device=closed.device) for _ in range(3)]
    for t in range(S if N else 0):
        pick = real[..., t : t + 1]
        scores = history.scores().expand(B, N, -1).masked_fill(taken, float("-inf"))
        log_p = scores.log_softmax(-1).gather(2, pick)[..., 0]
        log_q = (scores / at).log_softmax(-1).gather(2, pick)[..., 0]
        p = log_p.exp().masked_fill(ended, 0.0)
        sums = [sums[0] + p, sums[1] + log_p, sums[2] + log_q]
        if t + 1 < S:
            taken = _take(taken, pick[..., 0], start.stops)
            ended = pick[..., 0] == taken.shape[-1] - 1 if start.stops else ended
            history = history.advance(parent, pick[..., 0])
            parent = torch.arange(N, device=closed.device).expand(B, N)
    return Terms(*(s.round(decimals=DECIMALS) for s in sums))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)

Keys = npt.NDArray[np.uint64]


def draw_keys(seed: int, query_ids: npt.NDArray[np.int64], stream: str) -> Keys:
    """One 64-bit key per query for the named stream, [B] uint64."""
    start = hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8]
    return _mix(_mix(query_ids.astype(np.uint64)) ^ np.uint64(int.from_bytes(start, "little")))


def uniform(key: Keys, count: int) -> npt.NDArray[np.float64]:
    """``count`` numbers in the open interval (0, 1) per key, [B, count] float64."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(key[:, None] + counter)
    # 53 bits and a half: never 0 and never 1
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gumbel(key: Keys, count: int) -> npt.NDArray[np.float64]:
    """``count`` standard Gumbel numbers per key, [B, count] float64.

    The arg max of log-weights plus Gumbel numbers is a draw from their softmax.
    """
    return -np.log(-np.log(uniform(key, count)))


def _mix(value: Keys) -> Keys:
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    mixed: Keys = value ^ (value >> np.uint64(31))
    return mixed
