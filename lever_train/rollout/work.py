"""One shard's work: propose, ask, score, and make rows.

In go a :class:`Job` and a range of its queries; out comes a talk that asks prompts, is given their
answers and ends with the shard's tables.
Targeted queries are helped in rounds: propose what is not stored yet, score it, and go on with
those queries whose rewards are still all equal, until the shard's share of the budget is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lever_data.errors import LeverError
from lever_data.items.items import Truth
from lever_data.items.prompts import Item, Prompt
from lever_train.inputs.pools import SharedPool
from lever_train.options.rollout import Recipe
from lever_train.rollout.ask import Talk
from lever_train.rollout.job import Job
from lever_train.rollout.propose import Ask, Proposals, propose, unpadded
from lever_train.rollout.score import CandidateScore, candidates_table, queries_table, score
from lever_train.rollout.shards import Report, ShardRows

Ids = npt.NDArray[np.int64]
MAX_ROUNDS = 64  # a pool of 64 has 4,032 ordered pairs; some queries will never be mixed


@dataclass(frozen=True)
class Candidates:
    """Proposals for the queries ``ids`` (``proposals.row`` indexes them) with their scores."""

    ids: Ids
    proposals: Proposals
    scored: list[CandidateScore]


def make_shard(job: Job, part: slice) -> Talk[ShardRows]:
    """The tables of one shard, once its prompts are answered."""
    ids = job.query_ids[part]
    if job.stock is not None:
        found = yield from _target(job, part)
    else:
        proposals = candidates_of(job, part)
        scored = yield from scores_of(job, ids, proposals)
        found = Candidates(ids, proposals, scored)
    with_rows = np.unique(found.proposals.row).tolist()
    shown = ids[with_rows]
    tables = {
        "candidates": candidates_table(job.label, ids, found.proposals, found.scored),
        "queries": queries_table(
            job.label,
            [job.items[q] for q in shown.tolist()],
            [job.truths[q] for q in shown.tolist()],
            pools_of(job, shown),
        ),
    }
    modes = [s.whole.eval_mode for s in found.scored]
    counts = [modes.count(m) for m in ("file", "fallback", None)]
    return ShardRows(tables, Report(len(shown), len(modes), *counts))


def candidates_of(job: Job, part: slice) -> Proposals:
    """The first helping of a shard: the view's pointers, or what the policy proposes."""
    if job.given is not None:
        inside = job.given.select((job.given.row >= part.start) & (job.given.row < part.stop))
        return replace(inside, row=inside.row - part.start)
    if job.stock is not None:
        first = job.recipe.but(round=1)
        ids = job.query_ids[part]
        return _unknown(job, ids, _propose(job, ids, first), {})
    return _propose(job, job.query_ids[part], job.recipe)


def prompts_of(job: Job, ids: Ids, proposals: Proposals) -> list[Prompt]:
    """A prompt for every prefix asked for of every candidate, the whole pointer last.

    Raises:
        LeverError: a pointer names an example that is not there.
    """
    prompts = []
    for row, pointer in zip(proposals.row.tolist(), proposals.pointer.tolist(), strict=True):
        query = int(ids[row])
        shown = tuple(example_of(job, query, e) for e in pointer if e >= 0)
        given = job.truths[query].given
        item = job.items[query]
        prompts += [Prompt(item, shown[:k], given) for k in job.prefixes(len(shown))]
    return prompts


def scores_of(job: Job, ids: Ids, proposals: Proposals) -> Talk[list[CandidateScore]]:
    """Ask and score; one per proposal."""
    prompts = prompts_of(job, ids, proposals)
    answered = yield prompts
    truths: list[Truth] = [job.truths[p.query.example_id] for p in prompts]
    scored = score([a for _, a in answered], truths, job.scoring)
    scores = iter(zip(scored, answered, strict=True))
    found = []
    for pointer in proposals.pointer:
        lengths = job.prefixes(int((pointer >= 0).sum()))
        several = [next(scores) for _ in lengths]
        whole, (key, _) = several[-1]
        wanted = [
            (k, s) for k, (s, _) in zip(lengths, several, strict=True) if k in job.request.shots
        ]
        found.append(CandidateScore(whole, tuple(wanted), key))
    return found


def example_of(job: Job, query: int, example: int) -> Item:
    """A demonstration by its id.

    Raises:
        LeverError: the split does not have it.
    """
    item = job.examples.get(example)
    if item is None:
        raise LeverError(
            "a pointer names an example that the split does not have",
            where=f"query {query}",
            value=example,
            hint="ingest the questions and annotations of the demonstrations' split, or name it "
            "with --candidate-split",
        )
    return item


def _propose(job: Job, ids: Ids, recipe: Recipe) -> Proposals:
    assert job.policy is not None and job.pool is not None
    assert job.query_vectors is not None and job.example_vectors is not None
    pool = job.pool.ids if isinstance(job.pool, SharedPool) else job.pool.of(ids)
    device = job.request.inputs.device
    if len(pool) and int(pool.max()) >= len(job.example_vectors):
        raise LeverError(
            "the pool names an example that has no embedding",
            value=int(pool.max()),
            hint=f"the candidate embeddings have {len(job.example_vectors):,} rows",
        )
    queries, table = job.query_vectors[ids].to(device), job.example_vectors.to(device)
    ask = Ask(ids, queries, table, pool, job.own, job.features)
    return propose(job.policy, ask, recipe)


@dataclass
class _Targets:
    """The state of targeted queries between rounds."""

    tried: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)
    rewards: dict[int, tuple[float, float]] = field(default_factory=dict)

    def note(self, ids: Ids, proposals: Proposals, scored: Sequence[CandidateScore]) -> None:
        for row, pointer, one in zip(
            proposals.row.tolist(), unpadded(proposals.pointer), scored, strict=True
        ):
            query = int(ids[row])
            self.tried.setdefault(query, set()).add(pointer)
            if one.whole.correct is not None and one.whole.accuracy is not None:
                reward = one.whole.correct + one.whole.accuracy
                low, high = self.rewards.get(query, (reward, reward))
                self.rewards[query] = (min(low, reward), max(high, reward))

    def tied(self, query: int) -> bool:
        low, high = self.rewards.get(query, (0.0, 0.0))
        return low == high


def _target(job: Job, part: slice) -> Talk[Candidates]:
    assert job.stock is not None
    ids = job.query_ids[part]
    left = _share(job, part)
    state = _Targets(rewards={q: r for q in ids.tolist() if (r := job.stock.rewards.get(q))})
    active = np.arange(len(ids))
    parts: list[Candidates] = []
    for round_ in range(1, MAX_ROUNDS + 1):
        recipe = job.recipe.but(round=round_)
        asked = ids[active]
        proposals = _unknown(job, asked, _propose(job, asked, recipe), state.tried)
        if left is not None:
            proposals = proposals.select(np.arange(min(left, len(proposals.row))))
            left -= len(proposals.row)
        scored = yield from scores_of(job, asked, proposals)
        state.note(asked, proposals, scored)
        parts.append(Candidates(ids, replace(proposals, row=active[proposals.row]), scored))
        active = np.array([i for i in active.tolist() if state.tied(int(ids[i]))], dtype=np.int64)
        if left is None or left == 0 or not len(active):
            break
    columns = Proposals.__dataclass_fields__
    joined = {c: np.concatenate([vars(p.proposals)[c] for p in parts]) for c in columns}
    return Candidates(ids, Proposals(**joined), [s for p in parts for s in p.scored])


def _share(job: Job, part: slice) -> int | None:
    """The shard's part of the budget: in proportion to its queries, whole candidates."""
    budget, total = job.request.budget, len(job.query_ids)
    if budget is None:
        return None
    before, until = int(part.start), int(part.stop)
    return budget * until // total - budget * before // total


def _unknown(
    job: Job, ids: Ids, proposals: Proposals, tried: dict[int, set[tuple[int, ...]]]
) -> Proposals:
    """Without the pointers that are stored or were tried in an earlier round."""
    assert job.stock is not None
    stored, nothing = job.stock.pointers, set[tuple[int, ...]]()
    keep = []
    for row, key in zip(proposals.row.tolist(), unpadded(proposals.pointer), strict=True):
        query = int(ids[row])
        keep.append(key not in stored.get(query, nothing) and key not in tried.get(query, nothing))
    return proposals.select(np.array(keep, dtype=bool))


def pools_of(job: Job, ids: Ids) -> list[list[int] | None]:
    """The pools of the queries as stored with them; ``None`` where all share one."""
    if job.pool is None or isinstance(job.pool, SharedPool):
        return [None] * len(ids)
    return [[e for e in row if e >= 0] for row in job.pool.of(ids).tolist()]
