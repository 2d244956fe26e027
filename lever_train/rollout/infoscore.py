"""InfoScore: search a pool for the demonstrations that tell the model most about the answer.

In go a request; out comes a run of kind ``beam``, data for supervised training. The score of an
ordered set of demonstrations is the gain in log-probability of the ground truth over the prompt
without any, in nats:

    info(D) = log P(truth | D) - log P(truth | nothing)

P(truth) is the expected accuracy Σ_a P(a)·min(n_a / 3, 1), so that all answers of the annotators
count; probabilities below :data:`FLOOR` are taken as it. The search is greedy with beams: every
kept sequence is extended by every other example of the pool, and the ``num_beams`` best extensions
are kept (ties: the earlier sequence, then the lower position in the pool).

The legacy definition (``--info-score legacy``) is the difference of probabilities of the last step,
and sequences grow leftwards, the new demonstration before those that are there:

    info(e, D) = P(truth | e, D) - P(truth | D)

Two things differ from the legacy script all the same: P(truth) is the expected accuracy above where
the script took the probability of one answer, and it is at least :data:`FLOOR`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lever_data.items.items import Truth
from lever_data.items.prompts import Item, Prompt
from lever_data.store.schema import CANDIDATES
from lever_train.inputs.pools import SharedPool
from lever_train.options.rollout import Execution, Request
from lever_train.rollout.ask import Talk
from lever_train.rollout.generate import Outcome, make_run
from lever_train.rollout.job import Job
from lever_train.rollout.ray_engine import Progress
from lever_train.rollout.resolve import resolve
from lever_train.rollout.score import expected_score, queries_table
from lever_train.rollout.shards import Report, ShardRows
from lever_train.rollout.work import example_of, pools_of

FLOOR = 1e-6  # of P(truth): a log-probability of -13.8 nats
DECIMALS = 6


@dataclass(frozen=True)
class Beam:
    """A kept sequence: pool positions, and its score (nats, or a difference of probabilities)."""

    positions: tuple[int, ...]
    info: float


def search_beams(
    request: Request,
    execution: Execution | None = None,
    progress: Progress = lambda done, total, note: None,
) -> Outcome:
    """Search and commit; durable and resumable as :func:`generate` is.

    Raises:
        LeverError: as for :func:`generate`, or the answerer gives no log-probabilities.
    """
    # nothing is sampled, and no text is wanted
    recipe = request.recipe.but(temps=(), num_samples_per_temp=0, num_random=0, seed=0)
    answerer = request.answerer.but(generate=False, log_probs=True)
    request = request.but(recipe=recipe, answerer=answerer, shots=())
    execution = execution or Execution()
    job = resolve(request, "beam", computes=execution.engine == "local")
    return make_run(job, _make_shard, execution, progress)


def _make_shard(job: Job, part: slice) -> Talk[ShardRows]:
    ids = job.query_ids[part].tolist()
    search = _Search(job, ids)
    found = yield from search.run()
    kept = [q for q in ids if found[q]]
    rows = [(q, rank, beam) for q in kept for rank, beam in enumerate(found[q])]
    tables = {
        "candidates": _table(job, search.pools, rows),
        "queries": queries_table(
            job.label,
            [job.items[q] for q in kept],
            [job.truths[q] for q in kept],
            pools_of(job, np.array(kept, dtype=np.int64)),
        ),
    }
    return ShardRows(tables, Report(queries=len(kept), candidates=len(rows), failed=search.failed))


class _Search:
    """The beams of a shard's queries, all grown together so that prompts make large batches."""

    def __init__(self, job: Job, ids: list[int]) -> None:
        self.job = job
        self.pools = {q: self._pool(q) for q in ids}
        self.failed = 0

    def run(self) -> Talk[dict[int, list[Beam]]]:
        """The beams of every query, best first; none where its own prompt cannot be scored."""
        known = yield from self._info([(q, ()) for q in self.pools])
        nothing = {q: log_p for (q, _), log_p in known.items()}
        beams = {q: [Beam((), 0.0)] if q in nothing else [] for q in self.pools}
        last_step = self.job.recipe.last_step
        for _ in range(self.job.recipe.shot_num):
            grown = [
                (q, (k, *beam.positions) if last_step else (*beam.positions, k))
                for q, kept in beams.items()
                for beam in kept
                for k in range(len(self.pools[q]))
                if k not in beam.positions
            ]
            before, known = known, (yield from self._info(grown))
            found: dict[int, list[Beam]] = {q: [] for q in self.pools}
            for (q, positions), log_p in known.items():  # in the order they were grown
                info = log_p - nothing[q]
                if last_step:
                    info = math.exp(log_p) - math.exp(before[q, positions[1:]])
                found[q].append(Beam(positions, round(info, DECIMALS)))
            # a stable sort: among equals the earlier parent and position wins
            beams = {
                q: sorted(several, key=lambda b: -b.info)[: self.job.recipe.num_beams]
                for q, several in found.items()
            }
        return beams

    def _info(
        self, wanted: list[tuple[int, tuple[int, ...]]]
    ) -> Talk[dict[tuple[int, tuple[int, ...]], float]]:
        """log P(truth) of each (query, positions) that could be scored."""
        prompts = [self._prompt(q, positions) for q, positions in wanted]
        found: dict[tuple[int, tuple[int, ...]], float] = {}
        answered = yield prompts
        for key, (_, answer) in zip(wanted, answered, strict=True):
            probability = expected_score(answer, self._truth(key[0]), self.job.scoring)
            if probability is None:
                self.failed += 1
            else:
                found[key] = math.log(max(probability, FLOOR))
        return found

    def _prompt(self, query: int, positions: tuple[int, ...]) -> Prompt:
        shown = tuple(self.pools[query][k] for k in positions)
        return Prompt(self.job.items[query], shown, self._truth(query).given)

    def _truth(self, query: int) -> Truth:
        return self.job.truths[query]

    def _pool(self, query: int) -> list[Item]:
        pool = self.job.pool
        assert pool is not None
        ids = pool.ids if isinstance(pool, SharedPool) else pool.of(np.array([query]))[0]
        own = query if self.job.own else -1
        return [example_of(self.job, query, e) for e in ids.tolist() if e >= 0 and e != own]


def _table(job: Job, pools: dict[int, list[Item]], rows: list[tuple[int, int, Beam]]) -> pa.Table:
    """The table ``candidates`` of beams; no answer is scored, so the score columns are null."""
    count = len(rows)
    ranks = pa.array([rank for _, rank, _ in rows], pa.int32())
    definition = {"info_score": "legacy"} if job.recipe.last_step else {}
    extra = json.dumps(
        {"floor": FLOOR, "generation": job.label.generation, **definition}, sort_keys=True
    )
    columns: dict[str, Any] = {
        "dataset": [job.label.dataset] * count,
        "split": [job.label.split] * count,
        "query_id": [q for q, _, _ in rows],
        "candidate": ranks,
        "shot_num": [len(b.positions) for _, _, b in rows],
        "pointer": [[pools[q][k].example_id for k in b.positions] for q, _, b in rows],
        "gen_method": ["beam"] * count,
        "beam_rank": ranks,
        "info_score": [b.info for _, _, b in rows],
        "scorer": [job.label.scorer] * count,
        "metric": [job.label.metric] * count,
        "policy": ["infoscore"] * count,
        "extra": [extra] * count,
    }
    arrays = [pa.array(columns.get(f.name, [None] * count), f.type) for f in CANDIDATES]
    return pa.Table.from_arrays(arrays, schema=CANDIDATES)
