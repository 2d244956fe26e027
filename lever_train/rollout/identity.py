"""What makes two rollouts the same run: everything their rows depend on, by content.

In go a resolved job; out comes the :class:`RunSpec` whose hash names the run and its shards.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import numpy as np

from lever_data.items.prompts import Item
from lever_data.items.vqa_metric import METRIC_VERSION
from lever_data.store.files import sha256_file
from lever_data.store.store import RunSpec
from lever_train.inputs.pools import SharedPool
from lever_train.rollout.answerers import needs_images
from lever_train.rollout.answerers.base import canonical, seen
from lever_train.rollout.job import Ids, Job
from lever_train.rollout.proposals import PROPOSAL_VERSION


def run_spec(job: Job, parents: tuple[str, ...]) -> RunSpec:
    """The identity of the run a job will make."""
    request = job.request
    content = _digest(job)
    parameters: dict[str, Any] = {
        "versions": {"proposals": PROPOSAL_VERSION, "metric": METRIC_VERSION},
        "scorer": job.label.scorer,
        "policy": job.label.policy,
        "generation": job.label.generation,
        "shots": sorted(set(request.shots)),
        "allow_fallback": request.allow_fallback,
        "queries": len(job.query_ids),
        "content": content,
    }
    if job.given is None:
        parameters["recipe"] = asdict(job.recipe)
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
        digest.update(canonical([item.question_id, item.question, truth.answers, truth.official]))
    if not job.own:
        for number, item in job.examples.items():
            digest.update(canonical([number, item.question, item.answer, item.answers]))
    for vectors in (job.query_vectors, None if job.own else job.example_vectors):
        if vectors is not None:
            digest.update(vectors.numpy().tobytes())
    if job.given is not None:
        digest.update(job.given.row.tobytes())
    pointed = _pointed(job)
    digest.update(pointed.tobytes())
    if needs_images(job.request.answerer):
        for shown in seen(job.answerer, _shown(job, pointed)):
            digest.update(shown)
    if job.known is not None:
        stored = sorted((q, sorted(p)) for q, p in job.known.pointers.items())
        digest.update(repr(stored).encode())
    if job.request.inputs.checkpoint is not None:
        digest.update(sha256_file(job.request.inputs.checkpoint).encode())
    return digest.hexdigest()


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
