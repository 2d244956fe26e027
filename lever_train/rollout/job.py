"""What is to be done and what run it will make: everything a worker needs.

The identity of the run is a digest of everything its rows depend on, by content. A :class:`Job`
comes from a request by :func:`lever_train.rollout.resolve.resolve`, the same on every machine, so
that nothing but the request and shard numbers travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lever_data.items.items import Truth
from lever_data.items.prompts import Item
from lever_data.items.scoring import Scoring
from lever_data.store.files import sha256_file
from lever_data.store.store import Run, RunSpec, Store
from lever_data.store.workplace import Workplace
from lever_train.inputs.pair_features import PairFeatures
from lever_train.inputs.pools import PoolSource, SharedPool
from lever_train.options.rollout import Recipe, Request
from lever_train.rollout import views
from lever_train.rollout.answerers import Answerer, needs_images
from lever_train.rollout.answerers.base import canonical, seen
from lever_train.rollout.ask import Asker, Tally, scope
from lever_train.rollout.cache import AnswerCache, cache_folder
from lever_train.rollout.policy import Policy
from lever_train.rollout.propose import PROPOSAL_VERSION, Proposals
from lever_train.rollout.score import Label
from lever_train.rollout.shards import ShardFolder

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """What shards are made from.

    ``query_ids`` [n] int64 ascending; ``items`` and ``truths`` by query id; ``examples`` by
    example id; ``pool`` ``None`` where pointers come from a view; ``given`` those pointers, their
    ``row`` indexing ``query_ids``; ``stock`` what is stored of targeted queries; ``features`` what
    the policy reads of pairs; ``before`` the run of the same job whose failed answers are asked
    anew.
    """

    request: Request
    store: Store
    spec: RunSpec
    label: Label
    recipe: Recipe
    query_ids: Ids
    items: Mapping[int, Item]
    truths: Mapping[int, Truth]
    scoring: Scoring
    examples: Mapping[int, Item]
    own: bool
    answerer: Answerer
    policy: Policy | None
    query_vectors: Tensor | None
    example_vectors: Tensor | None
    pool: PoolSource | None
    given: Proposals | None
    stock: views.Stock | None
    features: PairFeatures | None = None
    before: Run | None = None

    @property
    def shards(self) -> list[slice]:
        """Consecutive ranges of ``query_ids``."""
        size = self.request.shard_size
        return [
            slice(s, min(s + size, len(self.query_ids)))
            for s in range(0, len(self.query_ids), size)
        ]

    def prefixes(self, length: int) -> list[int]:
        """The lengths at which a pointer of ``length`` is scored, the whole last."""
        return sorted({k for k in self.request.shots if k < length} | {length})


def workplace(job: Job) -> Workplace:
    """Where the job's processes meet: named after the run and the size of a shard."""
    key = f"{job.spec.run_id()}-s{job.request.shard_size}"
    return Workplace.of(job.store, key, cache_folder(job.store.path, scope(job.answerer)))


def shard_folder(job: Job) -> ShardFolder:
    """The shards of a job."""
    return ShardFolder(
        workplace(job), len(job.shards), lambda: job.store.find(job.spec) is not None
    )


def new_asker(job: Job, on_progress: Callable[[Tally], None] = lambda tally: None) -> Asker:
    """The job's answerer behind the store's cache, with what others were answered for this job."""
    place = workplace(job)
    place.gather()
    cache = AnswerCache(place.answers, place.share)
    return Asker(job.answerer, cache, on_progress, job.request.max_failed)


def run_spec(job: Job, parents: tuple[str, ...]) -> RunSpec:
    """The identity of the run a job will make."""
    request = job.request
    content = _digest(job)
    parameters: dict[str, Any] = {
        "versions": {"proposals": PROPOSAL_VERSION, "metric": job.scoring.name},
        "scorer": job.label.scorer,
        "policy": job.label.policy,
        "generation": job.label.generation,
        "shots": sorted(set(request.shots)),
        "allow_fallback": request.allow_fallback,
        "queries": len(job.query_ids),
        "content": content,
    }
    if job.given is None:
        # what is not asked for leaves the ids of runs as they were before it could be
        asked = {n for n in ("zero_shot", "last_alone") if getattr(job.recipe, n)}
        without = {"last_step", "zero_shot", "last_alone"} - asked
        parameters["recipe"] = job.recipe.model_dump(exclude=without)
    if job.recipe.last_step:
        parameters["info_score"] = "legacy"
    if request.which.target_view is not None:  # a budget is shared out by shard
        parameters |= {"budget": request.budget, "shard_size": request.shard_size}
    source = {"view": request.which.from_view or request.which.target_view or request.which.queries}
    return RunSpec(
        kind=job.spec.kind,
        dataset=job.label.dataset,
        split=job.label.split,
        source={k: v for k, v in source.items() if v is not None},
        source_sha256=content,
        parameters=parameters,
        parents=parents,
    )


def _digest(job: Job) -> str:
    """sha256 of the data a job reads: queries, ground truth, examples, vectors, pool, pointers, and
    the images its answerer looks at."""
    digest = hashlib.sha256(job.query_ids.tobytes())
    for number, item in job.items.items():
        truth = job.truths[number]
        known = [item.question_id, item.question, truth.answers, truth.official]
        digest.update(canonical([*known, *_further(item)]))
    if not job.own:
        for number, item in job.examples.items():
            whole = [number, item.question, item.answer, item.answers]
            digest.update(canonical([*whole, *_further(item)]))
    for vectors in (job.query_vectors, None if job.own else job.example_vectors):
        if vectors is not None:
            digest.update(vectors.numpy().tobytes())
    if job.given is not None:
        digest.update(job.given.row.tobytes())
    pointed = _pointed(job)
    digest.update(pointed.tobytes())
    if needs_images(job.request.answerer, job.scoring.task):
        for shown in seen(job.answerer, _shown(job, pointed)):
            digest.update(shown)
    if job.stock is not None:
        stored = sorted((q, sorted(p)) for q, p in job.stock.pointers.items())
        digest.update(repr(stored).encode())
    if job.features is not None:
        digest.update(job.features.run.encode())
    if job.request.inputs.checkpoint is not None:
        digest.update(sha256_file(job.request.inputs.checkpoint).encode())
    return digest.hexdigest()


def _further(item: Item) -> list[Mapping[str, str]]:
    return [item.fields] if item.fields else []


def _pointed(job: Job) -> Ids:
    """Ids a pointer may hold, -1 after the last: those of the pool or pools, else the pointers."""
    if job.given is not None:
        return job.given.pointer
    assert job.pool is not None  # where nothing is given, a policy proposes
    return job.pool.ids if isinstance(job.pool, SharedPool) else job.pool.of(job.query_ids)


def _shown(job: Job, pointed: Ids) -> list[Item]:
    """The queries, and the examples that may be shown; an id without an item fails in its shard."""
    examples = (job.examples.get(number) for number in np.unique(pointed).tolist())
    return [*job.items.values(), *(item for item in examples if item is not None)]
